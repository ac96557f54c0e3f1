"""Alembic runs this for each of its commands, from the checkout and for `saga-store` alike."""

import logging.config

from alembic import context

from saga_store.schema.environment import run

if context.config.config_file_name and context.config.cmd_opts:
    # Only for the command line: an application that calls Alembic has logging of its own.
    logging.config.fileConfig(context.config.config_file_name, disable_existing_loggers=False)

run()
