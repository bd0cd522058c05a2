"""Models beside each other: trained under one recipe with several seeds, counted, timed and drawn.

- `candidates`: what is compared, and the recipe of every run;
- `scores`: the runs, and what they reached;
- `speed`: time and memory, and how they grow with the input;
- `growth`: what an image costs at one side after the other, and where S3A becomes the dearer;
- `results`: what was found, as a file that a later call goes on with;
- `report`: the result as tables and a picture.
"""
