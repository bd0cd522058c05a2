"""Models beside each other: trained under one recipe with several seeds, counted, timed and drawn.

- `candidates`: what is compared, and the recipe of every run;
- `scores`: the runs, and what they reached;
- `speed`: time and memory, and how they grow with the input;
- `report`: the result as a file, a table and a picture.
"""
