"""Making ONNX Runtime sessions: the provider that was asked for, or an error; never another one in silence."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import onnxruntime

from qexport.errors import BundleError, InputError
from qexport.runtime.heap import give_back_freed
from qexport.targets import SessionConfig
from qexport.targets.ort_cuda import device_count

LOG_ERRORS_ONLY = 3
"""ONNX Runtime's severity: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal."""
_LOG_FATAL_ONLY = 4

_CUDA_ADVICE = 'install "onnxruntime-gpu[cuda,cudnn]", or use --provider cpu'


def choose_provider(wanted: str) -> str:
    """``"cuda"`` or ``"cpu"`` as wanted; ``"auto"`` is CUDA where there are a GPU and a build that can use it.

    Raises:
        InputError: CUDA is wanted, and this machine or this ONNX Runtime has none.
    """
    built = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if wanted == "auto":
        return "cuda" if built and device_count() else "cpu"
    if wanted == "cuda" and not built:
        raise InputError(f"this onnxruntime {onnxruntime.__version__} was built without CUDA; {_CUDA_ADVICE}")
    if wanted == "cuda" and not device_count():
        raise InputError("no CUDA device on this machine (the driver shows none); use --provider cpu")
    return wanted


def make_session(
    file: Path, root: Path, config: SessionConfig, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """A session for one graph of the bundle in folder `root`; memory that was needed to make it is given back.

    Args:
        file: the .onnx file.
        root: the bundle.
        config: provider and options, from `qexport.targets`.
        threads: threads for one operator on the CPU; None leaves it to ONNX Runtime (one per physical core).

    Raises:
        InputError: the provider could not be used.
        BundleError: ONNX Runtime cannot load the graph.
    """
    options = session_options(config, threads)
    session = open_session(model_of(file, root, options), options, config, str(file))
    give_back_freed()
    return session


def session_options(config: SessionConfig, threads: int | None = None) -> onnxruntime.SessionOptions:
    """ONNX Runtime's options for a configuration of ours; see `make_session`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_ERRORS_ONLY
    if threads is not None:
        if threads < 1:
            raise InputError(f"{threads} threads; at least 1 is needed")
        options.intra_op_num_threads = threads
    for key, value in config.entries.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    model: str | bytes, options: onnxruntime.SessionOptions, config: SessionConfig, name: str
) -> onnxruntime.InferenceSession:
    """A session for a model that is a path or bytes; `name` is what errors call it. Raises as `make_session`."""
    detail = _preload() if config.device == "cuda" else ""
    # The default logger is global; silenced here because a provider that fails to load prints a screenful.
    onnxruntime.set_default_logger_severity(_LOG_FATAL_ONLY)
    try:
        provider = (config.provider, dict(config.provider_options))
        session = onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise BundleError(f"{name}: onnxruntime cannot load this graph: {first_line(error)}") from error
    finally:
        onnxruntime.set_default_logger_severity(LOG_ERRORS_ONLY)
    if session.get_providers()[0] != config.provider:
        reason = f" ({detail})" if detail else ""
        raise InputError(f"onnxruntime could not start {config.provider}{reason}; {_CUDA_ADVICE}")
    return session


def model_of(file: Path, root: Path, options: onnxruntime.SessionOptions) -> str | bytes:
    """What to give a session for one graph of the bundle in folder `root`; adds to `options` what it needs.

    Paths of external data are relative to the folder of the graph for graphs in `root` itself, and to `root` for graphs
    in subfolders: onnxruntime refuses ``../weights.data``, so they could not reach the shared weights otherwise. Either
    way it refuses whatever lies outside `root`.
    """
    if file.parent == root:
        return str(file)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(root.resolve()))
    return file.read_bytes()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _preload() -> str:
    """Load the CUDA libraries that pip installed; they are not on the loader's path. Returns the first complaint."""
    printed = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(printed):  # it prints, and stdout may be the JSON of a command
            onnxruntime.preload_dlls()
    return printed.getvalue().strip().partition("\n")[0]
