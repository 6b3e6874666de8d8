"""Frozen encoders: timm, open_clip, transformers, torchvision, ONNX, wheels, exported students."""

from multikd.teachers.base import Teacher
from multikd.teachers.container import TeacherDict
from multikd.teachers.encoder import BackboneEncoder, ImageEncoder
from multikd.teachers.exported import ExportedEncoder
from multikd.teachers.hf import HuggingFaceEncoder
from multikd.teachers.inspection import EncoderReport, inspect_encoder
from multikd.teachers.onnx import OnnxEncoder
from multikd.teachers.open_clip import OpenClipEncoder
from multikd.teachers.packaged import PackagedEncoder
from multikd.teachers.registry import EncoderRow, list_encoders, load_encoder
from multikd.teachers.timm import TimmEncoder
from multikd.teachers.torchvision import TorchvisionEncoder
from multikd.teachers.trainable import TrainableTeacher

__all__ = [
    "BackboneEncoder",
    "EncoderReport",
    "EncoderRow",
    "ExportedEncoder",
    "HuggingFaceEncoder",
    "ImageEncoder",
    "OnnxEncoder",
    "OpenClipEncoder",
    "PackagedEncoder",
    "Teacher",
    "TeacherDict",
    "TimmEncoder",
    "TorchvisionEncoder",
    "TrainableTeacher",
    "inspect_encoder",
    "list_encoders",
    "load_encoder",
]
