"""Kinds of files that are read as streams of records."""
