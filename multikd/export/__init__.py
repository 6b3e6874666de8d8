"""Handing the finished student to other software."""

from multikd.export.card import CardFacts, TeacherFacts
from multikd.export.load import LoadedStudent, load
from multikd.export.timm_folder import TimmOptions, export_timm_folder

__all__ = [
    "CardFacts",
    "LoadedStudent",
    "TeacherFacts",
    "TimmOptions",
    "export_timm_folder",
    "load",
]
