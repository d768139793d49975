"""The models of the lab: sparse decoders and a sparse vision transformer, whose mixtures take any router.

- `decoder`: what people train today, small: pre-norm, rotary positions.
- `stream`: the decoder of the paper's family, to the last parameter.
- `vision`: ViT with mixtures in its later blocks.
- `sparse`: what they have in common.

A new model is one file, a dataclass in `lab.config` and a line in `registry`.
"""

from sinkroute.lab.models.decoder import Decoder
from sinkroute.lab.models.registry import MODELS, make_model
from sinkroute.lab.models.sparse import ParameterCount, SparseModel
from sinkroute.lab.models.stream import StreamDecoder
from sinkroute.lab.models.vision import VisionTransformer

__all__ = ["MODELS", "Decoder", "ParameterCount", "SparseModel", "StreamDecoder", "VisionTransformer", "make_model"]
