"""Data sets written as shards.

writer.py       samples of any source: encoded by threads, written in bounded shards, indexed
options.py      what all sources have in common: bounds, order, the folder that is written
aside.py        folders written aside and moved into place whole
keys.py         keys: made, checked, found if given twice
splits.py       data sets with a train and a test split, and how they are divided
digits.py       scikit-learn's digits
glyphs.py       digits and capitals of 27 fonts
toys.py         points of the plane
images.py       a folder of images
pairs.py        images with texts or labels, listed in a table
row_files.py    tables of text, read row by row
hub.py          a data set of the library `datasets`
columns.py      which of its columns become which fields
row_fields.py   from the values of a row to fields
arrays.py       arrays of NumPy
image_files.py  encoded images looked at, arrays of pixels made fit for PNG
merge.py        several shards as fewer, larger ones
listing.py      sizes of shards, and how many samples they hold
"""
