r"""The probe: a linear head on the frozen model, fitted within seconds.

The features are what the model's last linear layer reads, before anything is trained. On
them a regularised linear model is fitted, its penalty chosen by cross-validation, and
written into that layer. It is the plainest thing that can be done with a pretrained
model, and often hard to beat; and fine-tuning that starts from it does not distort
features to suit a random head [KRJ22].
"""

from __future__ import annotations

from bidora.probing.features import extract
from bidora.probing.fit import Features, LinearFit, constant_answer, fit_linear
from bidora.probing.start import Probe, StartFromProbe, probe, set_head

__all__ = [
    "Features",
    "LinearFit",
    "Probe",
    "StartFromProbe",
    "constant_answer",
    "extract",
    "fit_linear",
    "probe",
    "set_head",
]
