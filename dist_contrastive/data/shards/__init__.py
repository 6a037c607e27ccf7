"""Plain webdataset tars, and the index by which any of their samples is read at once.

tars.py         samples in tars: write, find
encoding.py     fields by extension: encode, decode (nothing is unpickled)
locations.py    which shards a folder, a pattern or a URL names
remote.py       bytes of a server, asked again until they come
block_cache.py  blocks of remote shards on a local disk
files.py        bytes of any shard
index.py        where every field of every sample lies, with checksums; reading by it
index_file.py   the index as a file, compared with its tars
indexing.py     the index of tars, whoever wrote them
"""
