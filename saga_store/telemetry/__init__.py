"""Figures for Prometheus (``prometheus``, extra ``ops``)."""
