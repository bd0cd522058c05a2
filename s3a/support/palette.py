"""The colours of all pictures: those of Okabe and Ito, which every kind of colour vision tells apart."""

BLUE, SKY_BLUE, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILLION, ORANGE, YELLOW, PINK = "#D55E00", "#E69F00", "#F0E442", "#CC79A7"
BLACK = "#000000"
WINE = "#882255"  # Paul Tol's, in place of YELLOW where lines are drawn: that is pale on white

# Text and ground.
INK, SOFT_INK, PAPER = "#1F2328", "#59636E", "#FFFFFF"
PEER = "#7F7F7F"  # what is measured for comparison alone, such as dense attention

# Curves and points of several runs or models, in this order. Their markers differ as well.
SERIES = (
    (BLUE, "o"),
    (VERMILLION, "s"),
    (GREEN, "^"),
    (PINK, "D"),
    (ORANGE, "v"),
    (SKY_BLUE, "P"),
    (BLACK, "X"),
    (WINE, "*"),
)

# A map of tokens: a query, its anchors, and what either of them sees in the local pass.
TOKEN = "#ECEEF1"
QUERY, ANCHOR, SEEN_BY_ANCHORS, SEEN_BY_QUERY = VERMILLION, BLUE, SKY_BLUE, ORANGE

# Marks over a photograph, which must be seen on skies and water too.
ANCHOR_ON_IMAGE, WINDOW_ON_IMAGE, LINE_ON_IMAGE = VERMILLION, YELLOW, PEER

# Families of models, which have these in all pictures.
FAMILY_STYLES = {
    "ssvit": (BLUE, "o"),
    "svit": (VERMILLION, "s"),
    "vvt": (GREEN, "^"),
    "swin": (PEER, "D"),
    "convnext": (ORANGE, "v"),
}
