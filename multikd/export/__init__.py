"""Handing the finished student to other software."""

from multikd.export.card import CardFacts, TeacherFacts
from multikd.export.timm_folder import export_timm_folder

__all__ = ["CardFacts", "TeacherFacts", "export_timm_folder"]
