"""Published multi-teacher students: their released files as folders that timm and we load.

Split by noun: ``publishers`` (who, under which licence, read where), ``released`` (a file, and
whose layout it has), ``vit`` (a plain ViT under timm's names), ``dinov2`` (UNIC and DUNE),
``radio``, ``theia``, ``eupe`` (one layout each), ``commands`` (what ``multikd import`` runs).
"""
