"""What a cluster gives to the stages when the recipe runs as a Kubeflow pipeline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KfpConfig:
    """Kubeflow Pipelines (`amenable kfp`); no stage's result depends on it."""

    image: str = "amenable:0.1.0"
    """Container image of every task, as the cluster pulls it; built from the `Dockerfile`."""

    volume: str = "amenable-runs"
    """Persistent volume claim that every task mounts: run folders, data and models lie there;
    empty: none, `mount` is in the image or mounted by the cluster."""

    mount: str = "/runs"
    """Where the volume is mounted; a run's folder is `NAME` in it."""

    gpus: int = 0
    """GPUs of a stage that loads a model (all but `data` and `report`)."""

    gpu_type: str = "nvidia.com/gpu"
    """The cluster's name of that resource."""

    memory: str = ""
    """Memory limit of such a stage, as `16G`; empty: the cluster's own."""

    cpu: str = ""
    """CPU limit of such a stage, as `4`; empty: the cluster's own."""

    retries: int = 0
    """How often a failed stage is tried again; it goes on from its last checkpoint."""

    caching: bool = True
    """Leave out the task of a stage whose results lie unchanged in the run folder."""
