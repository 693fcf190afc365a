"""Base models with their tokenizers and image processors, functions of (configuration, seed)."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpeft.models.architectures import check_fits, check_modality
from fedpeft.models.chat import set_template
from fedpeft.models.hub import fetching, one_sentence, weights_sha256
from fedpeft.models.packages import readable, reads_as_is
from fedpeft.models.pooling import MeanPooledClassifier
from fedpeft.models.precision import quantisation
from fedpeft.models.processors import plain_image_processor
from fedpeft.models.sites import head_names
from fedpeft.seeding import torch_seed

# Functions import transformers, because it takes seconds.

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Pretrained:
    """A transformers model from a local folder, the hub, or a folder inside a Python package.

    Args:
        path: folder or hub name; wins over ``package``.
        revision: the hub model's commit or tag.
        package: ``module/folder`` of an installed package that carries the weights, or
            ``module/file.gguf`` or ``module/file.onnx``, which is converted once into the cache.
        install: the command that installs ``package``.
        sha256: hash of the package's safetensors files or of its GGUF or ONNX file, checked before
            they are loaded or converted.
        architecture: the published configuration (``model_type`` and its fields). It suffices to
            count parameters on the meta device, or to build the model with random weights; an ONNX
            file is read by it.
        images: fields of a ViT's image processor, such as ``size``, for weights without a
            processor: an ONNX file's or random ones.
        random: build from ``architecture`` (or the folder's configuration) with random weights.
        settings: configuration fields to set on top, e.g. dropout probabilities.
        pooling: ``mean`` reads a classifier off the mean of the last layer's tokens, as sentence
            encoders are trained; null takes the architecture's own classifier.
        tokenizer_path: folder or hub name of the tokenizer or image processor, if not the model's.
        dtype: dtype of the frozen weights, ``float32`` or ``bfloat16``, which needs
            ``precision=bf16``. The task head, which trains, is float32 in both.
        load_in: ``8bit`` or ``4bit`` (NF4) quantises all linear layers but the head, with
            bitsandbytes on a GPU; null does not.
        gradient_checkpointing: keep only the blocks' inputs in training and recompute the rest for
            the gradient, which takes less memory and a third more work.
        chat_template: a Jinja template of conversations, in place of the tokenizer's own.
    """

    path: str | None = None
    revision: str | None = None
    package: str | None = None
    install: str | None = None
    sha256: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    random: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    pooling: str | None = None
    tokenizer_path: str | None = None
    dtype: str = "float32"
    load_in: str | None = None
    gradient_checkpointing: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.pooling not in (None, "mean"):
            raise ValueError(f"pooling must be mean or null, got {self.pooling}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype}")
        if self.load_in not in (None, "8bit", "4bit"):
            raise ValueError(f"load_in must be 8bit, 4bit or null, got {self.load_in}")
        if self.load_in is not None and self.random:
            raise ValueError(f"load_in={self.load_in} is for pretrained weights: set random=false")

    def source(self) -> str:
        """Return the folder or hub name that transformers loads.

        Raises:
            ValueError: neither path nor package is set, the path is no model's folder, or the
                package is not installed, or holds a file that has another hash than ``sha256`` or
                cannot be converted.
        """
        if self.path is not None:
            return _checked(self.path, "model.path", "config.json")
        if self.package is None:
            raise ValueError("model.path is not set: give a transformers folder or a hub name")
        lacking = {"architecture": self.architecture, "images": self.images}
        return readable(self.package, self.install, self.sha256, lacking)

    def config(self, num_labels: int | None, of_weights: bool = False) -> Any:
        """Return the transformers configuration, with ``settings`` on top.

        Args:
            num_labels: number of classes; null leaves it as it is.
            of_weights: read the file beside the weights. If false, ``architecture`` is taken where
                the weights may not be on this machine, because it needs no network.

        Raises:
            ValueError: the configuration cannot be loaded, or lacks a field of ``settings``.
        """
        from transformers import AutoConfig, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        extra = {} if num_labels is None else {"num_labels": num_labels}
        if self.architecture and (self.random or not (of_weights or self._is_local())):
            fields = dict(self.architecture)
            config = AutoConfig.for_model(fields.pop("model_type"), **fields, **extra)
        else:
            source = self.source()
            with one_sentence(source, self.revision):
                config = AutoConfig.from_pretrained(
                    source, **extra, **fetching(source, self.revision)
                )
        for key, value in self.settings.items():
            if not hasattr(config, key):
                raise ValueError(f"model.settings.{key} is no field of {type(config).__name__}")
            setattr(config, key, value)
        return config

    def _is_local(self) -> bool:
        if self.path is None:
            return self.package is not None and reads_as_is(self.package)
        return Path(self.path).expanduser().is_dir()

    def _name(self) -> str:
        return self.path or self.package or "the model"

    def check_precision(self, precision: str) -> None:
        """Check that the computation's ``precision``, fp32 or bf16, suits the weights.

        Raises:
            ValueError: the precision does not suit the weights.
        """
        if self.dtype == "bfloat16" and precision != "bf16":
            raise ValueError(f"model.dtype=bfloat16 needs precision=bf16, got {precision}")
        if precision == "fp32" or self.dtype == "bfloat16":
            return
        if self.config(None).model_type == "deberta":  # it masks with float32's least number
            raise ValueError(
                f"{self._name()} (deberta) computes with precision=bf16 only on weights of "
                "model.dtype=bfloat16, got float32"
            )

    def weights_sha256(self) -> str | None:
        """Hash the safetensors files; null for random weights, and if no such files are here."""
        return None if self.random else weights_sha256(self.source(), self.revision)

    def check_weights(self, expected: str | None, trained: str) -> None:
        """Check that the weights are those on which a method was trained.

        Args:
            expected: the SHA-256 of the weights in that training; null if it is not known.
            trained: names the run or the folder of which they are the base.

        Raises:
            ValueError: the weights have another hash.
        """
        now = self.weights_sha256() if expected else None
        if now and now != expected:
            raise ValueError(
                f"{trained} was trained on weights with SHA-256 {str(expected)[:12]}, and those in "
                f"{self.source()} have {now[:12]}: bring back what they were, or give their folder "
                "by model.path"
            )

    def build_meta(self, auto_class: str, num_labels: int | None) -> nn.Module:
        """Build the model on the meta device, without weights, to count parameters."""
        config = self.config(num_labels)
        with torch.device("meta"):
            return self._built(auto_class, config, lambda f: f.from_config(config))

    def build(self, auto_class: str, num_labels: int | None, seed: int) -> nn.Module:
        """Build the model on the CPU, or on the GPU if it is quantised.

        Args:
            auto_class: name of transformers' auto class for the task.
            num_labels: number of classes; null leaves the configuration's.
            seed: seeds what the files lack, such as a new head.

        Raises:
            ValueError: the weights cannot be had, differ from ``sha256``, are of an architecture
                that does not fit the task, or cannot be quantised here.
        """
        config = self.config(num_labels, of_weights=True)
        load = self._at_random(config) if self.random else self._from_files(auto_class, config)
        with torch_seed(seed, "model"):
            model = self._built(auto_class, config, load)
        for name in head_names(model):
            model.get_submodule(name).float()
        return model

    def _at_random(self, config: Any) -> Callable[[Any], nn.Module]:
        dtype = DTYPES[self.dtype]
        return lambda auto: auto.from_config(config, dtype=dtype).to(dtype)

    def _from_files(self, auto_class: str, config: Any) -> Callable[[Any], nn.Module]:
        source = self.source()
        self._check_hash(source)
        settings: dict[str, Any] = {"config": config, "dtype": DTYPES[self.dtype]}
        if self.load_in is not None:
            with torch.device("meta"):
                shape = self._built(auto_class, config, lambda f: f.from_config(config))
            settings["quantization_config"] = quantisation(self.load_in, shape)

        def load(auto: Any) -> nn.Module:
            with one_sentence(source, self.revision):
                model, report = auto.from_pretrained(
                    source,
                    **settings,
                    **fetching(source, self.revision),
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            self._note_new_head(model, report["mismatched_keys"])
            return model

        return load

    def _note_new_head(self, model: nn.Module, mismatched: Iterable[tuple[Any, ...]]) -> None:
        """Say that the files' head is of another size; refuse if another part is."""
        heads = head_names(model)
        for name, saved, built in sorted(mismatched, key=lambda entry: entry[0]):
            sizes = f"{name} of {self._name()} is {_size(saved)} in its files"
            if name.partition(".")[0] not in heads:
                raise ValueError(f"{sizes}, but {_size(built)} by its configuration")
            _warn(f"{sizes} and {_size(built)} for this task: the head starts anew")

    def _built(self, auto_class: str, config: Any, load: Callable[[Any], nn.Module]) -> nn.Module:
        import transformers

        check_fits(auto_class, config, self._name())
        if self.pooling == "mean" and auto_class == "AutoModelForSequenceClassification":
            return MeanPooledClassifier(load(transformers.AutoModel))
        return load(getattr(transformers, auto_class))

    def tokenizer(self) -> Any:
        """Return the fast tokenizer, with a padding token and a chat template.

        Raises:
            ValueError: the model reads images, the tokenizer cannot be had, or the template is
                not Jinja.
        """
        from transformers import AutoTokenizer

        tokenizer = self._processor(AutoTokenizer, "tokenizer")
        self._check_embedded(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        set_template(tokenizer, self.chat_template)
        return tokenizer

    def _check_embedded(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that gives tokens beyond the model's embeddings."""
        rows = getattr(self.config(None).get_text_config(), "vocab_size", None)
        last = max(tokenizer.get_vocab().values())
        if rows is not None and last >= rows:
            raise ValueError(
                f"the tokenizer of {self.tokenizer_path or self._name()} has tokens up to number "
                f"{last}, but {self._name()} embeds only the numbers below {rows}: set "
                "model.tokenizer_path to the tokenizer with which the model was trained"
            )

    def image_processor(self) -> Any:
        """Return the image processor, on PIL alone, which gives (B, C, H, W) ``pixel_values``.

        A random model without files gets the plain one. Grey images become RGB for a model of three
        channels.

        Raises:
            ValueError: the model reads text, or the processor cannot be had.
        """
        from transformers import AutoImageProcessor

        here = self._is_local() and (Path(self.source()) / "preprocessor_config.json").is_file()
        if self.random and self.tokenizer_path is None and not here:
            config = self.config(None)
            check_modality("image processor", config, self._name())
            processor = plain_image_processor(config, self.images)
        else:
            processor = self._processor(AutoImageProcessor, "image processor", backend="pil")
        processor.do_convert_rgb = len(processor.image_mean) == 3
        return processor

    def _processor(self, auto: Any, kind: str, **settings: Any) -> Any:
        """Load the tokenizer or image processor from ``tokenizer_path`` or the model's source."""
        check_modality(kind, self.config(None), self._name())
        if self.tokenizer_path is not None:
            source, revision = _checked(self.tokenizer_path, "model.tokenizer_path"), None
            key = "model.tokenizer_path"
        else:
            source, revision, key = self.source(), self.revision, "model.path"
        try:
            with one_sentence(source, revision, key):
                processor = auto.from_pretrained(source, **settings, **fetching(source, revision))
                _check_vocabulary(processor)
                return processor
        except ValueError as error:
            if self.random and self.tokenizer_path is None:
                raise ValueError(
                    f"{self._name()} with random weights still needs its {kind}, which is not at "
                    "hand: set model.tokenizer_path to a folder that has one"
                ) from error
            raise

    def _check_hash(self, source: str) -> None:
        if self.sha256 is None or self.package is None or self.path is not None:
            return
        if not reads_as_is(self.package):  # checked when it was converted
            return
        actual = weights_sha256(source)
        if actual != self.sha256:
            raise ValueError(
                f"weights in {source} have sha256 {actual}, expected {self.sha256}: "
                "install the pinned package again"
            )


@cache
def _warn(text: str) -> None:
    """Warn once a process, because a run builds its base model again for the summary."""
    log.warning(text)


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _checked(path: str, key: str, file: str = "") -> str:
    """Return a hub name as it is, and a folder's path with ``~`` expanded.

    Args:
        path: a folder if it starts with ``.``, ``/`` or ``~``; else it may be a hub name.
        key: names the path in the error.
        file: a file that the folder must hold.

    Raises:
        ValueError: the path can only be a folder, but is none or lacks ``file``.
    """
    if not path.startswith((".", "/", "~")):
        return path
    folder = Path(path).expanduser()
    if not ((folder / file).is_file() if file else folder.is_dir()):
        raise ValueError(f"{key}={path} is no folder" + (f" with a {file}" if file else ""))
    return str(folder)


def _check_vocabulary(processor: Any) -> None:
    """Refuse a tokenizer of special tokens alone, which transformers makes if it finds no file."""
    if not hasattr(processor, "get_vocab"):
        return
    if len(processor.get_vocab()) <= len(set(processor.all_special_tokens)):
        raise ValueError("there is no tokenizer.json or other vocabulary, only special tokens")
