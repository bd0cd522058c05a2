"""The backends, by name. A new one is a file beside this one and a row here."""

from s3a.attention.backends import blocks, flex, reference, tiled, tiles
from s3a.attention.backends.backend import Backend

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="flex",
            layout=blocks.lay_out_blocks,
            attend=flex.attend,
            why_not=flex.why_not,
            estimate=blocks.estimate,
            read_options=flex.choose_blocks,
        ),
        Backend(
            name="tiled",
            layout=tiles.lay_out_tiles,
            attend=tiled.attend,
            why_not=lambda _: None,
            estimate=tiles.estimate,
        ),
        Backend(
            name="reference",
            layout=reference.lay_out_keys,
            attend=reference.attend,
            why_not=lambda _: None,
            estimate=reference.estimate,
        ),
    )
}
