"""Data sets written as shards.

options.py  options of all sources, the target folder, keys
writer.py   samples of any source: encoded by threads, written in bounded shards, indexed
images.py   a folder of images
pairs.py    images with texts or labels, listed in a table
columns.py  columns of a `datasets` data set, and the fields that they become
hub.py      a data set of the library `datasets`
arrays.py   arrays of NumPy
merge.py    several shards as fewer, larger ones
demos.py    digits and glyphs
toys.py     points of the plane
"""
