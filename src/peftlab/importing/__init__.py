"""Adapters of other people's making become bundles; each form of file that is read has a file here."""
