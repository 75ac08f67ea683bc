"""The embedded world: coloured shapes on 32 x 32 pixels, prompts of GenEval's six kinds, and a verifier without learned weights.

>>> import flowalign.shapes as shapes
>>> records = shapes.prompts("heldout", seed=0, num=6)
>>> bool(shapes.verify(shapes.render(records, seed=0), records).strict.all())
True
"""

from pathlib import Path
from typing import TYPE_CHECKING

from flowalign.shapes.prompts import Metadata as Metadata
from flowalign.shapes.prompts import prompts as prompts
from flowalign.shapes.verifier import Verdict as Verdict
from flowalign.shapes.verifier import verify as verify
from flowalign.shapes.world import render as render

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

FOLDER = Path(__file__).parent / "pipeline"


def pipeline() -> "StableDiffusion3Pipeline":
    """Load the shipped pipeline, an ordinary ``StableDiffusion3Pipeline`` in float32."""
    from flowalign.shapes.models import load_pipeline

    return load_pipeline(FOLDER)
