"""Checkpoints: the original's `.pth` files, transformers' directories, and our own format."""

from blipfast.checkpoints.initialise import init_from_timm_vit, init_text_from_bert
from blipfast.checkpoints.load import LoadReport, load_model
from blipfast.checkpoints.save import convert, model_hash, original_state_dict, save_hf, save_model

__all__ = [
    "LoadReport",
    "convert",
    "init_from_timm_vit",
    "init_text_from_bert",
    "load_model",
    "model_hash",
    "original_state_dict",
    "save_hf",
    "save_model",
]
