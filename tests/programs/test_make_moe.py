"""examples/make_moe.py: a mixture with all experts active is the dense model; distilling brings the others closer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import corpora
import fresh
import make_moe
from close import assert_close
from tiny import dense, domain, logits, tokens

ROOT = Path(__file__).parents[2]


def llama(**changes) -> LlamaForCausalLM:
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "intermediate_size": 96, **changes})
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("shared", [0, 32])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 16, "tie_word_embeddings": True}])
def test_all_experts_together_are_the_dense_model(changes, shared):
    model = llama(**changes).double()
    mixture = make_moe.make(model, tokens(8), experts=4, active=4, shared=shared).double()
    mixture.set_experts_implementation("eager")  # grouped products know no fp64
    # routing weights that are nearly alike: with all experts there are none to choose
    for layer in mixture.model.layers:
        layer.mlp.gate.weight.data.zero_()
    assert_close("logits", logits(mixture), logits(model), "fp32")


def test_every_neuron_is_somewhere_once():
    amounts = torch.rand(50, 96, generator=torch.Generator().manual_seed(0))
    common, groups = make_moe.divide(amounts, experts=4, shared=32)
    assert torch.cat([common, groups.flatten()]).sort().values.tolist() == list(range(96))
    assert groups.shape == (4, 16)
    # those that contribute most are shared
    rest = groups.flatten()
    assert amounts[:, common].square().mean(0).min() >= amounts[:, rest].square().mean(0).max()


def test_neurons_that_fire_together_are_one_expert():
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 4, (400,), generator=generator)
    owner = torch.arange(64) % 4
    amounts = (kind[:, None] == owner).float() + 0.1 * torch.rand(400, 64, generator=generator)
    _, groups = make_moe.divide(amounts, experts=4, shared=0)
    assert sorted(int(owner[group][0]) for group in groups) == [0, 1, 2, 3]
    assert all(len(set(owner[group].tolist())) == 1 for group in groups)
    # and a router finds the expert of each token
    x = torch.nn.functional.one_hot(kind, 8).float()
    chosen = (x @ make_moe.fit_router(x, amounts, groups).T).argmax(1)
    assert all(int(owner[groups[e]][0]) == int(k) for e, k in zip(chosen, kind, strict=True))


def test_down_projections_make_up_for_what_is_left_out(monkeypatch):
    """On the text that they were fitted on, each layer's MLP is nearer to the dense one, which only the router's own
    choice of experts tells."""
    torch.manual_seed(0)
    model, ids = dense(), tokens(16, 32)
    entered = make_moe.inputs_of_mlps(model, ids)
    fitted = make_moe.make(model, ids, experts=4, active=2, shared=0)
    monkeypatch.setattr(make_moe, "refit", lambda x, old, *_: old.down_proj.weight)
    plain = make_moe.make(model, ids, experts=4, active=2, shared=0)
    for index, x in enumerate(entered):
        wanted = model.model.layers[index].mlp(x)
        away = [float((mixture.model.layers[index].mlp(x[None])[0] - wanted).norm()) for mixture in (fitted, plain)]
        assert away[0] < 0.95 * away[1]


def test_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(OSError, match="has no tokenizer that transformers reads"):
        make_moe.read_dense(str(tmp_path / "gpt2"))
    tokenizer = corpora.AutoTokenizer.from_pretrained(corpora.EMBEDDED_MODEL)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="gpt2 is gpt2; expected a model of llama, mistral, qwen2 with SiLU"):
        make_moe.read_dense(str(tmp_path / "gpt2"))
    for numbers, text in (
        ((4, 5, 0), "4 experts, 5 active, 0 of 96 neurons shared"),
        ((4, 2, 20), "76 neurons do not divide among 4 experts .*: try --shared 32"),
    ):
        with pytest.raises(ValueError, match=text):
            make_moe.mixture_config(llama().config, *numbers)


@pytest.mark.slow
def test_the_program_goes_on(tmp_path):
    """Distilled in two halves: the mixture comes closer to the dense model, and loads as any Qwen2-MoE does."""
    tokenizer = corpora.AutoTokenizer.from_pretrained(corpora.EMBEDDED_MODEL)
    llama(vocab_size=len(tokenizer), eos_token_id=0).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    for split in ("train", "eval"):
        lines = [json.dumps({"text": text[:2000]}) for text in corpora.language_reference(split)[:8]]
        (tmp_path / f"text.{split}.jsonl").write_text("\n".join(lines))
    options = [tmp_path / "dense", tmp_path / "moe", "--device", "cpu", "--text", tmp_path / "text", "--length", 32]
    options += ["--experts", 4, "--active", 1, "--shared", 32, "--fit-windows", 16, "--save-steps", 5, "--lr", 3e-3]
    for steps in (5, 20):
        done = fresh.run(ROOT / "examples" / "make_moe.py", *options, "--steps", steps, folder=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "moe" / "make_moe.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "mixture, untrained", "mixture, distilled"]
    assert "20/20" in done.stderr
    assert "1/20" not in done.stderr.replace("11/20", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 1)


@pytest.mark.slow
def test_distilling_lowers_the_divergence(tmp_path):
    model = dense()
    mixture = make_moe.make(model, domain(16), experts=4, active=1, shared=0)

    def divergence() -> float:
        ids = domain(8, seed=3)
        expected, found = (torch.log_softmax(logits(m, ids), -1) for m in (model, mixture))
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    before = divergence()
    options = {"steps": 30, "batch": 8, "lr": 3e-3, "save_steps": 100, "seed": 0, "device": "cpu", "autocast": False}
    make_moe.distill(model, mixture.train(), domain(64), tmp_path, make_moe.argparse.Namespace(**options))
    mixture.eval()
    assert divergence() < 0.8 * before
