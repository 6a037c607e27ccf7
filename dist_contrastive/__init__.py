"""Training where every sample of a very large batch is compared with every other.

One notation in the whole package:

    W       number of ranks (world size)
    b, B    rows on this rank, rows of the global batch (B = sum of b over ranks)
    D       dimension of an embedding
    M, N    generated points (negative) and data points (positive) of the contrastive force
    G       independent groups of points
    rows    the samples whose loss this rank computes; keys: what they are compared with
    lse     logarithm of a sum of exponentials
    lane    one of the L equal parts in which an epoch is read
"""

__version__ = "0.1.0"
