"""Frozen encoders: timm, open_clip, wheels, exported students, and users' own classes."""

from multikd.teachers.base import Teacher
from multikd.teachers.container import TeacherDict
from multikd.teachers.encoder import BackboneEncoder, ImageEncoder
from multikd.teachers.exported import ExportedEncoder
from multikd.teachers.inspection import EncoderReport, inspect_encoder
from multikd.teachers.open_clip import OpenClipEncoder
from multikd.teachers.packaged import PackagedEncoder
from multikd.teachers.registry import EncoderRow, list_encoders, load_encoder
from multikd.teachers.timm import TimmEncoder

__all__ = [
    "BackboneEncoder",
    "EncoderReport",
    "EncoderRow",
    "ExportedEncoder",
    "ImageEncoder",
    "OpenClipEncoder",
    "PackagedEncoder",
    "Teacher",
    "TeacherDict",
    "TimmEncoder",
    "inspect_encoder",
    "list_encoders",
    "load_encoder",
]
