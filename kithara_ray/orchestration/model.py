"""The model handle of the public API. It holds the base's location and the trained tensors, never base weights."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.train import RunConfig, ScalingConfig

from kithara_ray.checkpoint.run_files import tokenizer_of
from kithara_ray.errors import ConfigError
from kithara_ray.hf import beside
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.exports.request import ExportRequest
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.identity import check_same_base
from kithara_ray.hf.model_files import has_tokenizer
from kithara_ray.hf.publish.publish import check_destination
from kithara_ray.hf.resizing.tables import described
from kithara_ray.hf.tower import text_of
from kithara_ray.model.families import family_of
from kithara_ray.model.families.family import training_note
from kithara_ray.model.families.tensors import check_tensors
from kithara_ray.model.lora.targets import check_targets, linear_modules_of, lora_config_of, other_modules_of
from kithara_ray.model.options import PRECISIONS, QUANTIZATIONS
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.generator import GeneratorActor, Request, Weights, tell_generation
from kithara_ray.orchestration.generator_group import generate_on_group
from kithara_ray.orchestration.head import adapters
from kithara_ray.orchestration.head.adapters import AdapterExport, AdapterRef
from kithara_ray.orchestration.head.coordinator import living_coordinator
from kithara_ray.orchestration.preflight.probes import HeadProbes
from kithara_ray.orchestration.request.preset import check_choice, check_known, check_unset
from kithara_ray.sft.tokens.prompts import Prompting
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.storage.urls import absolute

logger = logging.getLogger(__name__)


class KerasHubModel:
    """A KerasHub causal LM to fine-tune. Create one with `from_preset`.

    Attributes:
        preset_handle: location of the base.
        lora: LoRA settings; None trains all weights.
        precision: Keras dtype policy of the computation.
        quantize: storage of the frozen kernels while the adapter is trained: "int8", "int4", "nf4", or None for the
            base's dtype.
        adapter: the trained tensors by name, float32: A (r, in), B (out, r) and DoRA's magnitudes (out,). None before
            training.
        run: description of the last training (run.json), which exports carry. None before training.
        run_directory: directory of the last training. Exports are added to its report.
        prompting: tokenizer, chat template and end tokens for `generate`, from the last training or else from the base.
        tokenizer: location of that tokenizer's files, for exports. None takes the base's.
        trained: directory of the trained weights, if all weights were trained. None before training.
    """

    def __init__(self, preset_handle: str, lora: LoraConfig | None, precision: str, quantize: str | None = None):
        self.preset_handle = preset_handle
        self.lora = lora
        self.precision = precision
        self.quantize = quantize
        self.adapter: dict[str, np.ndarray] | None = None
        self.trained: str | None = None
        self.run: dict[str, Any] | None = None
        self.run_directory: str | None = None
        self.prompting = Prompting(preset_handle)
        self.tokenizer: str | None = None
        self._coordinator = None
        self._generator = GeneratorActor()

    @classmethod
    def from_preset(
        cls,
        preset_handle: str,
        lora_rank: int | None = None,
        precision: str = "mixed_bfloat16",
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = ("q_proj", "v_proj"),
        target_parameters: Sequence[str] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        init_lora_weights: str | bool = True,
        exclude_modules: str | Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        bias: str = "none",
        lora_bias: bool = False,
        modules_to_save: Sequence[str] | None = None,
        trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        ensure_weight_tying: bool = False,
        resize_token_embeddings: int | None = None,
        adapter: str | None = None,
        allow_other_base: bool = False,
        quantize: str | None = None,
        **unknown: Any,
    ) -> "KerasHubModel":
        r"""Create a model from a Hugging Face directory. For LoRA, `lora_rank=16` is enough.

        Args:
            preset_handle: `hf://org/name`, a local Hugging Face directory, or one in `gs://` or `s3://`.
            lora_rank: rank of the factors; None trains all weights.
            precision: "mixed_bfloat16" (activations bfloat16), "bfloat16" or "float32". The frozen base keeps its
                checkpoint's dtype in memory; factors and optimizer state are float32. If all weights are trained, they
                and their optimizer state are float32 too. With "bfloat16" they are bfloat16, which rounds small updates
                away.
            lora_alpha: the update is scaled by alpha / rank. The default is alpha = rank, as in Kithara.
            lora_dropout: fraction of the side paths' inputs that is dropped in training.
            target_modules: the layers to adapt, as PEFT names them. Give a list of names or of dotted endings
                ("layers.3.mlp.up_proj"), or one string with a regular expression that matches whole names
                (r".*\.(q|v)_proj"). "all-linear" adapts all layers but embeddings and head, as in PEFT: in some
                mixtures the experts and router too. One name may be a string. An empty list adapts none.
            target_parameters: ends of the names of a mixture's parameters to adapt, such as "experts.gate_up_proj".
            use_rslora: scale by alpha / sqrt(rank).
            use_dora: train the length of each weight row separately from its direction (arXiv:2402.09353).
            rank_pattern, alpha_pattern: other ranks and alphas for modules whose name ends in a regular expression.
            init_lora_weights: True draws A as PEFT does (kaiming), "gaussian" from a normal of deviation 1 / rank.
            exclude_modules: modules to leave out of the targets, in the same form as target_modules.
            layers_to_transform: number of the one block to adapt, or a list of such numbers.
            layers_pattern: name of the list that layers_to_transform indexes, for modules with several numbers in their
                name. By default the first number counts.
            bias: "all" trains the base's biases too, "lora_only" those of the adapted layers.
            lora_bias: train a bias of lora_B. If a layer of the base has no bias, there is no merged export.
            modules_to_save: "embed_tokens", "lm_head" or both, trained in full besides the factors.
            trainable_token_indices: ids of tokens whose embedding rows are trained, and whose head rows are if the head
                is the embedding. A mapping gives such lists for "embed_tokens" and "lm_head".
            ensure_weight_tying: train modules_to_save as one weight if the head is the embedding.
            resize_token_embeddings: number of rows that embedding and head shall have, for example len(tokenizer) of a
                tokenizer with added tokens. A new row is the mean of the old ones.
            adapter: a PEFT adapter to train further, or only to export: a directory, `hf://` or `gs://`. It brings all
                LoRA settings, so give none of them with it.
            allow_other_base: accept an adapter whose base differs from this one in fingerprint, revision or name.
            quantize: storage of the frozen kernels of linear layers while the adapter is trained. "int8" has a scale
                for each output channel and half of bfloat16's memory. "int4" and "nf4" (QLoRA's 16 levels, the more
                exact) have a scale for each group of 64 weights and 27 % of it. Embedding, head and norms keep their
                dtype. Exports and `generate` use the base as it is.

        Raises:
            ConfigError: an argument is wrong, or a target matches nothing.
            AdapterError: `adapter` is not complete, does not fit this base or was trained on another.
            UnsupportedError: the model family, or a field of its config, is not supported.
            CheckpointError: there is no base at the handle, or its config.json and tensors do not belong together.
        """
        check_known(unknown)
        check_choice("precision", precision, PRECISIONS)
        if quantize is not None:
            check_choice("quantize", quantize, QUANTIZATIONS)
        settings = {
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": target_modules,
            "target_parameters": target_parameters,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "init_lora_weights": init_lora_weights,
            "exclude_modules": exclude_modules,
            "layers_to_transform": layers_to_transform,
            "layers_pattern": layers_pattern,
            "bias": bias,
            "lora_bias": lora_bias,
            "modules_to_save": modules_to_save,
            "trainable_token_indices": trainable_token_indices,
            "ensure_weight_tying": ensure_weight_tying,
            "resize_token_embeddings": resize_token_embeddings,
        }
        handle = absolute(preset_handle)
        # An object store is asked for the headers only: no weight comes to the driver.
        base = BaseCheckpoint.at(handle)
        family_of(base.config)
        check_tensors(base)
        if note := training_note(text_of(base.config)):
            logger.warning("%s: %s", handle, note)
        if adapter is not None:
            check_unset(cls.from_preset, {"lora_rank": lora_rank, **settings}, "with adapter=: the adapter has its own")
            return cls._with_adapter(handle, base, absolute(adapter), precision, allow_other_base, quantize)
        if lora_rank is None:
            why = "without lora_rank=, which trains all weights and no adapter"
            check_unset(cls.from_preset, settings | {"quantize": quantize}, why)
            return cls(handle, None, precision)
        return cls(handle, lora_config_of(lora_rank, base, **settings), precision, quantize)

    @classmethod
    def _with_adapter(
        cls,
        handle: str,
        base: BaseCheckpoint,
        adapter: str,
        precision: str,
        allow_other_base: bool,
        quantize: str | None,
    ) -> "KerasHubModel":
        directory = fetch(adapter)
        loaded = Adapter.read(directory).named_for(base).fitted(base)
        trained_on, allow = loaded.trained_on, allow_other_base
        check_same_base(trained_on, base, handle, adapter=adapter, allow=allow, override="allow_other_base=True")
        base = described(base, loaded.config)
        loaded.validate(base)
        check_targets(loaded.config, linear_modules_of(base), other_modules_of(base))
        model = cls(handle, replace(loaded.config, **beside.normal(loaded.config, base)), precision, quantize)
        model.adapter = {name: np.asarray(tensor, np.float32) for name, tensor in loaded.tensors.items()}
        model.take_tokenizer(adapter if has_tokenizer(str(directory)) else tokenizer_of(adapter))
        return model

    def take_tokenizer(self, location: str | None) -> None:
        """Use the tokenizer files at `location` for prompts and exports; None takes the base's own."""
        self.tokenizer = location
        self.prompting = Prompting.at(location) if location is not None else Prompting(self.preset_handle)

    def save_in_hf_format(
        self,
        output_dir: str,
        dtype: str = "auto",
        only_save_adapters: bool = False,
        save_adapters_separately: bool = False,
        parallel_threads: int | None = None,
        *,
        max_shard_size: int | str | None = None,
        check_finite: bool = False,
        check_logits: bool = False,
        resume: bool = False,
        experts: str | None = None,
    ) -> str:
        """Write the trained model for transformers, PEFT and vLLM. The coordinator does this on the head node.

            only_save_adapters=True          a PEFT adapter
            save_adapters_separately=True    the base, and the adapter in `<output_dir>/adapter`
            neither                          base and adapter merged into one model

        If all weights were trained, the coordinator writes them in the layout of the base's files.

        Args:
            output_dir: a new or empty directory, local to the head node, or `gs://...`, `s3://...`.
            dtype: dtype of the written base; "auto" keeps the base's.
            parallel_threads: number of weight files written at once; two per node by default. If a URL is involved,
                each thread needs disk for two of these files in its node's TMPDIR.
            max_shard_size: maximum size of a weight file, in bytes or as text like "5GB". By default as in the base.
            check_finite: refuse a NaN or an infinity in a written weight, including the base's own.
            check_logits: refuse a merged model unless its logits match those of the base with the adapter. For small
                models in a local directory: the head node computes both in float32, one after the other.
            resume: continue a killed or failed export of the same model in `output_dir`. Weight files that are verified
                are kept. If this export fails too, it leaves its files there.
            experts: "per_expert" writes factors of each expert apart, for servers that do not read PEFT's packed ones.

        Returns: the location of the written model.

        Raises:
            ConfigError: nothing has been trained, or there is no adapter.
            DestinationError: `output_dir` exists and is not empty, or cannot be written.
            ExportError: the written files failed verification; nothing is left behind.
        """
        layout = (only_save_adapters, save_adapters_separately)
        how = (parallel_threads, max_shard_size, check_finite, check_logits, resume, experts)
        request = ExportRequest(str(output_dir), dtype, *layout, *how)
        request.check(self.lora)
        if (self.adapter if self.lora is not None else self.trained) is None:
            raise ConfigError("nothing has been trained yet: call Trainer(...).train() before save_in_hf_format")
        coordinator = self.coordinator()
        options = request.options(self.preset_handle, self.run, self.tokenizer)
        if self.lora is None:
            what = (self.preset_handle, self.trained, request.output_dir, options, request.parallel_threads)
            written = remote_get(coordinator.export_trained.remote(*what))
        else:
            written = self._export_adapter(coordinator, request, options)
        if self.run_directory is not None:
            try:
                ray.get(coordinator.add_export.remote(self.run_directory, written), timeout=120)
            except Exception as error:  # the export itself is written and verified
                logger.warning("the report in %s does not list %s: %s", self.run_directory, written, error)
        return written

    def _export_adapter(self, coordinator: ActorHandle, request: ExportRequest, options: ExportOptions) -> str:
        how = (request.output_dir, request.layout, options, request.parallel_threads, request.check_logits)

        def export(adapter: AdapterRef) -> ray.ObjectRef:
            return coordinator.export.remote(AdapterExport(adapter, *how))

        return self.ask_with_adapter(export, self.run_directory)

    def ask_with_adapter(self, call: Callable[[AdapterRef], Any], directory: str | None) -> Any:
        """Call the coordinator with a reference to the adapter; see `adapters.ask`. `directory` is the run's."""
        assert self.lora is not None
        assert self.adapter is not None
        reference = AdapterRef(self.preset_handle, self.lora, adapters.digest_of(self.adapter), directory)
        return adapters.ask(call, reference, self.adapter)

    def check_destination(self, output_dir: str) -> None:
        """Check before a long training that `save_in_hf_format` could write there, by creating and deleting an object.

        Raises DestinationError: `output_dir` exists and is not empty, or cannot be written.
        """
        start_ray()
        HeadProbes({absolute(str(output_dir)): check_destination}).check()

    @property
    def weights_handle(self) -> str:
        """Location of the weights that an adapter applies to, or that training continues from."""
        return self.trained or self.preset_handle

    def coordinator(self) -> ActorHandle:
        """Return this model's coordinator; start it on the first call, or if Ray was restarted."""
        start_ray()
        self._coordinator = living_coordinator(self._coordinator)
        return self._coordinator

    def generate(
        self,
        inputs: Any,
        max_length: int = 100,
        stop_token_ids: str | Sequence[int] = "auto",
        strip_prompt: bool = False,
        tokenizer: Any = None,
        tokenizer_handle: str | None = None,
        return_decoded: bool = True,
        skip_special_tokens: bool = True,
        *,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        cpu_devices_per_worker: int = 1,
        mesh: MeshShape | None = None,
        cluster_timeout_s: float = 300.0,
    ) -> list[str] | list[list[int]]:
        """Continue prompts greedily with the base and the training so far.

        One actor, by default, decodes on the CPU of one node. It keeps the weights until training starts, and its
        compiled programs until `release()` is called. This suits small models. With `scaling_config`, a group of
        workers decodes, as in training. They end after the answer, so give them all prompts at once.

        Args:
            inputs: a text, token ids, a chat (a list of {"role", "content"}, rendered by the chat template), or a list
                of these. They are tokenised as the rows of training are.
            max_length: maximum tokens of prompt and continuation together.
            stop_token_ids: tokens to stop at. "auto" takes the tokenizer's EOS, those of generation_config.json and
                those that ended the answers in training. A warning names each other setting of generation_config.json,
                which is ignored.
            strip_prompt: return the continuation only.
            tokenizer, tokenizer_handle: by default those of the last training, with its chat template; else the
                base's own.
            return_decoded: return texts; False returns token ids.
            scaling_config, run_config, cpu_devices_per_worker, mesh, cluster_timeout_s: as in `Trainer`, for the
                workers. By default small weights are whole on every device, and others are split, by the same rule.

        Returns: one text, or one list of token ids, per prompt.

        Raises DataError: a prompt is empty, or has an id for which the embedding has no row.
        """
        start_ray()
        tell_generation(self.preset_handle)
        prompting = self.prompting.given(tokenizer, tokenizer_handle)
        weights = Weights(self.weights_handle, self.lora, self.precision, self.adapter)
        request = Request(
            inputs=inputs,
            tokenizer=prompting.tokenizer,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            strip_prompt=strip_prompt,
            return_decoded=return_decoded,
            skip_special_tokens=skip_special_tokens,
            chat_template=prompting.chat_template,
            ends=prompting.ends,
        )
        if scaling_config is not None:
            group = WorkerGroup(scaling_config, run_config or RunConfig(), cpu_devices_per_worker, cluster_timeout_s)
            return generate_on_group(group, weights, request, mesh)
        return self._generator.generate(weights, request)

    def release(self) -> None:
        """End `generate`'s actor, which frees its memory."""
        self._generator.end()

    def unload(self) -> None:
        """Free the weights of `generate`'s actor; its process stays, with the programs that it has compiled."""
        self._generator.unload()

    def detach(self) -> None:
        """Forget this handle's actors without ending them, so that a copy of the handle can go on using them."""
        self._coordinator, self._generator = None, GeneratorActor()

    def set_adapter(self, tensors: dict[str, np.ndarray]) -> None:
        """Store the adapter that training ended with."""
        self.unload()
        self.adapter = tensors

    def set_trained(self, directory: str) -> None:
        """Store the directory of the trained weights, if all weights were trained."""
        self.release()
        self.trained = directory
