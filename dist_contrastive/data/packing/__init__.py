"""Data sets written as shards.

options.py  options of all sources, the target folder, keys
writer.py   samples of any source: encoded by threads, written in bounded shards, indexed
images.py   a folder of images
tables.py   tables, read row by row: .csv, .tsv, .json, .jsonl
columns.py  columns of a table, and the fields that they become
rows.py     rows of a table as samples
hub.py      a data set: a table, or what the library `datasets` reads
pairs.py    images with texts or labels, listed in a table
arrays.py   arrays of NumPy
merge.py    several shards as fewer, larger ones
demos.py    digits and glyphs
toys.py     points of the plane
"""
