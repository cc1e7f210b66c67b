"""Stand-ins for servers that generate (vLLM, SGLang): a Llama that takes weights by name, and checks every one.

What is known of vLLM 0.32 and of SGLang was read in their sources, and nothing of them is used: both hold the three
projections of an attention as one tensor, and so the two of the gate; take the weights of files by their names there;
leave out what is tied, and rotary frequencies. vLLM raises for other names.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.func import functional_call

FUSED = {
    ".q_proj": (".qkv_proj", 0), ".k_proj": (".qkv_proj", 1), ".v_proj": (".qkv_proj", 2),
    ".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1),
}  # fmt: skip


class ServedLlama:
    """A Llama's tensors as such a server holds them. ``loaded``: which of them have been written since ``begin()``."""

    def __init__(self, config, dtype=torch.float32):
        self.config, self.tied = config, config.tie_word_embeddings
        d, words, head = config.hidden_size, config.vocab_size, config.hidden_size // config.num_attention_heads
        q, kv, inner = config.num_attention_heads * head, config.num_key_value_heads * head, config.intermediate_size
        self.rows = {".qkv_proj": (q, kv, kv), ".gate_up_proj": (inner, inner)}
        shapes = {"model.embed_tokens.weight": (words, d), "model.norm.weight": (d,)}
        shapes |= {} if self.tied else {"lm_head.weight": (words, d)}
        for i in range(config.num_hidden_layers):
            at = f"model.layers.{i}"
            shapes |= {
                f"{at}.self_attn.qkv_proj.weight": (q + 2 * kv, d), f"{at}.self_attn.o_proj.weight": (d, q),
                f"{at}.mlp.gate_up_proj.weight": (2 * inner, d), f"{at}.mlp.down_proj.weight": (d, inner),
                f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,),
            }  # fmt: skip
        self.tensors = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}
        self.begin()

    def begin(self):
        self.loaded = []

    def load_weights(self, weights):
        for name, tensor in weights:
            if "rotary_emb.inv_freq" in name or (self.tied and name == "lm_head.weight"):
                continue
            place = self._place(name)
            if place is None:
                raise ValueError(f"There is no module or parameter named {name!r}")
            if name in self.loaded:
                raise ValueError(f"{name} comes twice")
            assert type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta, (name, type(tensor))
            assert tensor.shape == place.shape and tensor.dtype == place.dtype, (name, tensor.shape, tensor.dtype)
            place.copy_(tensor.detach())
            self.loaded.append(name)
        return set(self.loaded)

    def _place(self, name):
        for part, (fused, i) in FUSED.items():
            if part in name and (whole := self.tensors.get(name.replace(part, fused))) is not None:
                return whole.split(self.rows[fused])[i]
        return self.tensors.get(name)

    def names(self):
        """Those of files that it takes."""
        found = []
        for name in self.tensors:
            parts = [p for p, (fused, _) in FUSED.items() if fused in name]
            found += [name.replace(FUSED[p][0], p) for p in parts] or [name]
        return found

    def end(self):
        """All of it has been written; the same as a state dict."""
        missing = set(self.names()) - set(self.loaded)
        assert not missing, f"not loaded: {sorted(missing)}"
        state = {name: self._place(name).clone() for name in self.names()}
        return state | ({"lm_head.weight": state["model.embed_tokens.weight"]} if self.tied else {})


class Server:
    """What TRL asks of vLLM, in both of its modes: ``LLM`` in the process, and the client of one elsewhere.

    ``states``: the weights after every synchronisation, by which the next words are drawn.
    """

    def __init__(self, plain):
        self.model, self.served, self.states = plain.eval(), ServedLlama(plain.config, plain.dtype), []
        self.ended, self.asked = 0, []

    def load_weights(self, weights):
        self.served.load_weights(weights)

    def reset_prefix_cache(self):
        """The end of a synchronisation."""
        self.states.append(self.served.end())
        self.served.begin()

    @torch.no_grad()
    def draw(self, prompts, n, length):
        """`n` completions for each prompt of ids, with their log probabilities."""
        made, tied = [], self.model.config.tie_word_embeddings
        state = {k: v for k, v in self.states[-1].items() if not (tied and k == "lm_head.weight")}
        for prompt in prompts:
            for _ in range(n):
                ids, logprobs = list(prompt), []
                for _ in range(length):
                    logits = functional_call(self.model, state, (torch.tensor([ids]),)).logits[0, -1].float()
                    ids.append(torch.multinomial(logits.softmax(-1), 1).item())
                    logprobs.append(logits.log_softmax(-1)[ids[-1]].item())
                made.append((list(prompt), ids[len(prompt) :], logprobs))
        return made


@contextlib.contextmanager
def in_trl(monkeypatch, server):
    """TRL's GRPO finds `server` where it would have vLLM."""
    from trl.generation import vllm_generation as trls

    class LLM:
        """``vllm.LLM``, as far as TRL knows it."""

        def __init__(self, model, **settings):
            runner = SimpleNamespace(model=server)
            executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
            self.llm_engine = SimpleNamespace(
                model_executor=executor,
                model_config=SimpleNamespace(max_model_len=server.model.config.max_position_embeddings),
            )
            self.reset_prefix_cache = server.reset_prefix_cache
            server.asked.append((model, settings))

        def generate(self, prompts, sampling_params, use_tqdm):
            outputs = []
            for prompt, ids, logprobs in server.draw(
                [p["prompt_token_ids"] for p in prompts], sampling_params.n, sampling_params.max_tokens
            ):
                of_words = [{i: SimpleNamespace(rank=1, logprob=p)} for i, p in zip(ids, logprobs, strict=True)]
                one = SimpleNamespace(token_ids=ids, logprobs=of_words)
                outputs.append(SimpleNamespace(prompt_token_ids=prompt, outputs=[one]))
            return outputs

    class Client:
        """``trl.generation.vllm_client.VLLMClient``."""

        def __init__(self, base_url, **settings):
            server.asked.append((base_url, settings))

        def init_communicator(self, device):
            pass

        def get_server_info(self):
            return {"model_config": {"logprobs_mode": "processed_logprobs"}}

        def update_named_params(self, metadata, named_params):
            for (name, dtype, shape), (sent, tensor) in zip(metadata, named_params, strict=True):
                assert (name, dtype, shape) == (sent, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
                server.load_weights([(sent, tensor)])

        def reset_prefix_cache(self):
            server.reset_prefix_cache()

        def generate(self, prompts, features, n, max_tokens, **_):
            made = server.draw(prompts, n, max_tokens)
            return {
                "prompt_ids": prompts,
                "completion_ids": [ids for _, ids, _ in made],
                "logprobs": [[[p] for p in logprobs] for _, _, logprobs in made],
            }

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        patch.setattr(trls, "is_vllm_available", lambda *_: True)
        patch.setattr(trls, "LLM", LLM, raising=False)
        patch.setattr(trls, "SamplingParams", SimpleNamespace, raising=False)
        patch.setattr(trls, "VLLMClient", Client)
        yield server
