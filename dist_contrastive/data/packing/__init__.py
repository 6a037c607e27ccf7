"""Data sets written as shards."""
