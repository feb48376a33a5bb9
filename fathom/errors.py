"""Every error that fathom raises on purpose, in one tree.

    FathomError
    +-- ConfigError              a model configuration that cannot be used
    |   +-- UnsupportedModelError   recognised, but another architecture (V4.1, DSpark)
    +-- CheckpointError          a checkpoint that is missing something, wrong or damaged
    +-- KernelError              an operation has no kernel for this device
    +-- ChatError                messages or tools that cannot be rendered as a prompt
    |   +-- RequestError            an API request with a field that cannot be served
    |       +-- ThreadUnsupported      it wants the server to keep the conversation
    +-- TokenizerError           text asked of a model that has no tokenizer
    +-- GenerationError          sampling values or a prompt that cannot be served
    |   +-- CacheFull               memory for another sequence or more tokens is used up
    +-- CacheError               a stored cache, session or log that cannot be used
    +-- BackendError             the engine behind a server failed or cannot be reached
    +-- ServerError              a server that cannot start with these settings
    +-- SandboxError             the sandbox itself failed (a command that fails is a result)
    |   +-- Unsupported             this machine or substrate cannot do what was asked
    |   +-- SandboxLost             the sandbox ended while it was needed
    |   +-- ProcessClosed           a command was closed while it was still read or written to
    |   +-- DaemonLost              nobody answers for sandboxes any more; they may still run
    |   +-- SandboxTimeout          a command, or the sandbox's own part, took too long
    |   +-- SandboxOutOfMemory      a command was ended because its sandbox's memory was full
    |   +-- KeyConflict             a key for creation belongs to a sandbox of other values
    |   +-- MachineFull             a disk, folder or table of this machine is full
    |   +-- PolicyDenied            a policy or quota of this machine forbids what was asked
    |   +-- SnapshotMissing         a snapshot, or one that it grew from, is not there
    |   +-- SnapshotDamaged         a snapshot, or one that it grew from, is not what was written
    +-- AgentError               the agent could not run its loop
    |   +-- ModelUnreachable        the model behind a URL did not answer properly
    +-- TrainError               a training run that cannot start or continue
    +-- MissingDependency        an optional package or program that was asked for is not installed

Each class carries a stable `code`; only codes cross a wire. Messages say what happened, where, and
what to do about it.

Paper: none (shared infrastructure).
"""


class FathomError(Exception):
    """Base of every deliberate error. `code` is stable and safe to match on."""

    code = "fathom_error"


class ConfigError(FathomError):
    """A configuration value is missing, of the wrong type or contradicts another one."""

    code = "config_invalid"


class UnsupportedModelError(ConfigError):
    """The configuration belongs to a model that is not DeepSeek-V4 as launched."""

    code = "model_unsupported"


class CheckpointError(FathomError):
    """A checkpoint folder, file or tensor is missing, unexpected, mis-shaped or damaged."""

    code = "checkpoint_invalid"


class KernelError(FathomError):
    """No kernel is registered under this name for this backend."""

    code = "kernel_missing"


class ChatError(FathomError):
    """Messages or tools cannot be rendered as a prompt."""

    code = "chat_invalid"


class RequestError(ChatError):
    """An API request cannot be served; `param` names the field, such as `messages[2].content`."""

    code = "request_invalid"

    def __init__(self, message: str, param: str | None = None) -> None:
        """Make the error; the field leads its text."""
        super().__init__(f"{param}: {message}" if param else message)
        self.message = message
        self.param = param


class ThreadUnsupported(RequestError):
    """A request wants the server to keep its conversation.

    Clients know this code: they send the whole conversation from then on.
    """

    code = "thread_unsupported_request"


class TokenizerError(FathomError):
    """A tokenizer is missing or does not fit the model."""

    code = "tokenizer_invalid"


class GenerationError(FathomError):
    """Sampling values or a prompt that cannot be served."""

    code = "generation_invalid"


class CacheFull(GenerationError):
    """The memory for cache entries or sequences is used up."""

    code = "cache_full"


class CacheError(FathomError):
    """A cache folder, session or log is damaged, cannot be written or belongs to another model."""

    code = "cache_invalid"


class BackendError(FathomError):
    """The engine behind a server failed, or cannot be reached."""

    code = "backend_failed"


class ServerError(FathomError):
    """A server cannot start: its settings are unsafe or contradict each other."""

    code = "server_invalid"


class SandboxError(FathomError):
    """The sandbox itself failed. A command that exits non-zero is a result, not an error."""

    code = "sandbox_failed"


class Unsupported(SandboxError):
    """This machine or substrate cannot do what was asked; nothing degrades silently."""

    code = "sandbox_unsupported"


class SandboxLost(SandboxError):
    """The sandbox ended while it was still needed."""

    code = "sandbox_lost"


class ProcessClosed(SandboxError):
    """A running command was closed by another task or thread while this one used it."""

    code = "sandbox_process_closed"


class DaemonLost(SandboxError):
    """Nobody answers for sandboxes any more; those that were running may still run."""

    code = "sandbox_daemon_lost"


class SandboxTimeout(SandboxError):
    """A command, or what the sandbox itself had to do, took longer than it was given."""

    code = "sandbox_timeout"


class SandboxOutOfMemory(SandboxError):
    """A process was ended because the memory of its sandbox was full."""

    code = "sandbox_out_of_memory"


class KeyConflict(SandboxError):
    """A sandbox was made under this key already, from other values than are given now."""

    code = "sandbox_key_conflict"


class MachineFull(SandboxError):
    """This machine has no room left for what had to be written or opened; nothing was changed."""

    code = "sandbox_machine_full"


class PolicyDenied(SandboxError):
    """A policy or quota of this machine forbids what was asked."""

    code = "sandbox_policy_denied"


class SnapshotMissing(SandboxError):
    """A snapshot, or one that it grew from, is not there."""

    code = "snapshot_missing"


class SnapshotDamaged(SandboxError):
    """A file of a snapshot, or of one that it grew from, is not what was written."""

    code = "snapshot_damaged"


class AgentError(FathomError):
    """The agent loop cannot start or continue."""

    code = "agent_failed"


class ModelUnreachable(AgentError):
    """The model behind a URL refused, timed out or answered something unreadable."""

    code = "model_unreachable"


class TrainError(FathomError):
    """A training run cannot start or continue."""

    code = "train_failed"


class MissingDependency(FathomError):
    """An optional package or program that was asked for is not installed."""

    code = "dependency_missing"
