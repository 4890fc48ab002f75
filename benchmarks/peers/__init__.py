"""Published rules of faster global attention, rebuilt on the stock model, to compare with.

Each rule is a small frozen object, made from its published parameters and one that is swept. Called with the queries,
keys and values of a global block, it gives what heads put out and how many pairs of queries and keys that took.
`runner.applied` runs a stock model with one. They are written from the papers, without code of their authors.
"""

from .avggt import AVGGT
from .block_sparse import BlockSparse
from .fastvggt import FastVGGT
from .good_tokens import GoodTokens
from .litevggt import LiteVGGT
from .spark3r import Spark3R

RULES = (FastVGGT, LiteVGGT, AVGGT, Spark3R, GoodTokens, BlockSparse)

__all__ = ["AVGGT", "RULES", "BlockSparse", "FastVGGT", "GoodTokens", "LiteVGGT", "Spark3R"]
