"""Counterfactual Knowledge Distillation for multimodal recommenders, federated over modality owners.

The method (Zhang et al., ACM MM 2024, arXiv:2408.06360) in plain PyTorch. This package knows nothing of Flower except in
:mod:`ckd_fed.wire`; the federation lives in the packages ``server`` and ``clients``.
"""

__version__ = "0.1.0"
