"""The order of samples, and the stream that reads them in it.

order.py         the order: a pure function of (seed, epoch, position)
balanced.py      that of class-balanced batches
weighted.py      that of several sources with weights
unreadable.py    what takes the place of samples that cannot be read
reader.py        the rows of this process in every batch
workers.py       the same by several processes
shard_stream.py  ShardStream: batches for this rank, resumable from one number
prefetch.py      batches made ready ahead by a thread
"""
