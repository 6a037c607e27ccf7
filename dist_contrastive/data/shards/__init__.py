"""Plain webdataset tars, and the index by which any of their samples is read at once.

tars.py         samples in tars: write, find
encoding.py     fields by extension: encode, decode (nothing is unpickled)
remote.py       requests to servers, with retries
locations.py    the shards of a folder, a pattern or a URL
storage.py      bytes of any shard, through a cache if it is remote
index.py        place and checksum of every field of every sample; reading by it
index_file.py   the file of an index: written, and read without trust in what it tells
scan.py         index of one tar
indexing.py     indexes loaded, compared with their tars, and made of tars, whoever wrote them
inspect.py      summaries: samples, fields, types of values, classes
shard_check.py  problems of one shard
verify.py       problems of shards and of their indexes
"""
