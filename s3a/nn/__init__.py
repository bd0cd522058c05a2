"""Parts of networks: Sparse Scan Self-Attention, rotary embedding, convolutions, and their compilation."""
