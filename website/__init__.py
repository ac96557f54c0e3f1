"""How docs/ becomes a site: ``make docs`` runs MkDocs, which calls ``website.hooks``."""
