"""Base models and tokenizers: pure in (configuration, seed)."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fedpeft.seeding import torch_seed


@dataclass(frozen=True)
class Pretrained:
    """A transformers model: a local folder, a hub name, or a folder inside a Python package.

    Args:
        path: folder or hub name; wins over ``package``.
        revision: the hub model's commit or tag.
        package: ``module/folder`` of an installed package that carries the weights.
        extra: the extra of fedpeft that installs ``package``.
        sha256: of the package's ``model.safetensors``, checked before it is loaded.
        architecture: the published configuration (``model_type`` and its fields), enough to count
            parameters on the meta device, or to build the model with random weights.
        random: build from ``architecture`` (or the folder's configuration) with random weights.
        settings: configuration fields to set on top, e.g. dropout probabilities.
        pooling: ``mean`` reads a classifier off the mean of the last layer's tokens, as sentence
            encoders are trained; null takes the architecture's own classifier.
    """

    path: str | None = None
    revision: str | None = None
    package: str | None = None
    extra: str | None = None
    sha256: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    random: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    pooling: str | None = None

    def __post_init__(self) -> None:
        if self.pooling not in (None, "mean"):
            raise ValueError(f"pooling must be mean or null, got {self.pooling}")

    def source(self) -> str:
        """The folder or hub name that transformers gets.

        Raises:
            ValueError: neither path nor package is set, or the package is not installed.
        """
        if self.path is not None:
            if self.path.startswith((".", "/", "~")):
                folder = Path(self.path).expanduser()
                if not (folder / "config.json").is_file():
                    raise ValueError(f"model.path={self.path} is no folder with a config.json")
                return str(folder)
            return self.path
        if self.package is None:
            raise ValueError("model.path is not set: give a transformers folder or a hub name")
        module, _, inner = self.package.partition("/")
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"the package {module} with the default model is not installed: "
                f"install fedpeft with its extra [{self.extra}], or set model.path"
            )
        return str(Path(spec.origin).parent / inner)

    def config(self, num_labels: int | None) -> Any:
        """The transformers configuration; the published one where no weights are at hand."""
        from transformers import AutoConfig

        extra = {} if num_labels is None else {"num_labels": num_labels}
        if self.architecture and (self.random or not self._is_local()):
            fields = dict(self.architecture)
            config = AutoConfig.for_model(fields.pop("model_type"), **fields, **extra)
        else:
            with _hub_errors(self.source()):
                config = AutoConfig.from_pretrained(self.source(), **extra, **self._revision())
        for key, value in self.settings.items():
            if not hasattr(config, key):
                raise ValueError(f"model.settings.{key} is no field of {type(config).__name__}")
            setattr(config, key, value)
        return config

    def _is_local(self) -> bool:
        return self.package is not None or Path(self.path or "").expanduser().is_dir()

    def _revision(self) -> dict[str, str]:
        return {} if self.revision is None else {"revision": self.revision}

    def build_meta(self, auto_class: str, num_labels: int | None) -> nn.Module:
        """The architecture without weights, to count parameters."""
        with torch.device("meta"):
            return self._built(auto_class, lambda f: f.from_config(self.config(num_labels)))

    def build(self, auto_class: str, num_labels: int | None, seed: int) -> nn.Module:
        """The model in float32 on the CPU; new parts, such as the head, are seeded.

        Raises:
            ValueError: the weights cannot be had, or differ from ``sha256``.
        """
        config = self.config(num_labels)
        if self.random:
            with torch_seed(seed, "model"):
                return self._built(auto_class, lambda f: f.from_config(config))
        source = self.source()
        self._check_hash(source)
        with torch_seed(seed, "model"), _hub_errors(source):
            return self._built(
                auto_class,
                lambda f: f.from_pretrained(
                    source, config=config, dtype=torch.float32, **self._revision()
                ),
            )

    def _built(self, auto_class: str, load: Callable[[Any], nn.Module]) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if self.pooling == "mean" and auto_class == "AutoModelForSequenceClassification":
            return MeanPooledClassifier(load(transformers.AutoModel))
        return load(getattr(transformers, auto_class))

    def tokenizer(self) -> Any:
        """The fast tokenizer, with a padding token."""
        from transformers import AutoTokenizer

        with _hub_errors(self.source()):
            tokenizer = AutoTokenizer.from_pretrained(self.source(), **self._revision())
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    def _check_hash(self, source: str) -> None:
        if self.sha256 is None or self.path is not None:
            return
        found = weights_sha256(source)
        if found != self.sha256:
            raise ValueError(
                f"weights in {source} have sha256 {found}, expected {self.sha256}: "
                "install the pinned package again"
            )


class MeanPooledClassifier(nn.Module):
    """A backbone, the mean of its last layer over real tokens, and one linear layer."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.config: Any = backbone.config
        self.backbone = backbone
        if getattr(backbone, "pooler", None) is not None:
            backbone.register_module(
                "pooler", None
            )  # reads the first token only; nothing would use it
        self.classifier = nn.Linear(self.config.hidden_size, self.config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """(B, L) token ids and mask to logits (B, num_labels)."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean))  # type: ignore[arg-type]


def weights_sha256(source: str) -> str | None:
    """sha256 over a folder's safetensors files in the order of their names; None without any."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class _hub_errors:
    """Turns a hub's many errors into one sentence that says what to give instead."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise ValueError(
                f"model {self.source} is neither a folder here nor to be had from the hub "
                f"({kind.__name__}): give a folder with config.json and safetensors by model.path="
            ) from error
