"""Order of samples, and the stream that reads them in it.

order.py         the order: a pure function of (seed, epoch, position)
balanced.py      order of class-balanced batches
weighted.py      order of several sources with weights
reader.py        the rows of one process in every batch; substitutes of unreadable samples
workers.py       reading by several processes
shard_stream.py  ShardStream: batches for this rank, resumable from one number; Prefetcher
"""
