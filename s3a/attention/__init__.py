"""The operator: what users call, the plan of a scan on a map, and the backends that execute it."""

from s3a.attention.functional import neighborhood_attention, sparse_scan_attention

__all__ = ["neighborhood_attention", "sparse_scan_attention"]
