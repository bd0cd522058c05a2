"""How well trained models do on images unlike those that they were trained on.

- `corruptions`: the names, groups and mean corruption error of ImageNet-C's corruptions;
- `images`: corrupted images, made as they are read;
- `evaluation`: top-1 of several weights on the same corrupted images;
- `results`: what was found, as a file that a later call goes on with;
- `lines`: which weights are seeds of one line of the tables, and its label;
- `report`: the result as tables and a picture;
- `imagenet`: ImageNet's sets, measured subset by subset;
- `reproduction`: official checkpoints beside what their papers print.
"""
