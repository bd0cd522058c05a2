"""How well trained models do on images unlike those that they were trained on.

- `corruptions`: the names, groups and mean corruption error of ImageNet-C's corruptions.
"""
