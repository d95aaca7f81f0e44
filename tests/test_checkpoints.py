"""hypnettorch's hypernetworks, read: the same weights, applied without being formed."""

import pytest
import torch
import torch.nn.functional as F

from hyperkernels.checkpoints import read_hypnettorch
from hyperkernels.weight import form

hnets = pytest.importorskip("hypnettorch.hnets", reason="needs hypnettorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # hypnettorch's own
SHAPES = [[20, 10], [20], [5, 20], [5]]
COMMON = {"layers": (10, 12), "verbose": False}
KINDS = {
    "HMLP, tasks": (hnets.HMLP, {"cond_in_size": 8, "num_cond_embs": 4}),
    "HMLP, both": (hnets.HMLP, {"cond_in_size": 8, "num_cond_embs": 4, "uncond_in_size": 3}),
    "HMLP, inputs": (hnets.HMLP, {"cond_in_size": 0, "num_cond_embs": 0, "uncond_in_size": 3, "use_bias": False}),
    "ChunkedHMLP, tasks": (hnets.ChunkedHMLP, {"cond_in_size": 8, "num_cond_embs": 4, "chunk_size": 42}),
    "ChunkedHMLP, both": (
        hnets.ChunkedHMLP,
        {"cond_in_size": 8, "num_cond_embs": 4, "uncond_in_size": 3, "chunk_size": 42, "chunk_emb_size": 5},
    ),
}


def make(name):
    kind, settings = KINDS[name]
    theirs = kind(SHAPES, **(COMMON | settings))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return theirs, settings


@pytest.mark.parametrize("name", KINDS)
def test_the_same_weights_and_applied(name, tmp_path):
    theirs, settings = make(name)
    torch.save(theirs.state_dict(), tmp_path / "hnet.pt")
    net = read_hypnettorch(torch.load(tmp_path / "hnet.pt", weights_only=True), SHAPES)
    uncond, ids = torch.randn(3, 3), torch.tensor([2, 0, 3])
    given = {"uncond_input": uncond} if "uncond_in_size" in settings else {}
    if settings["cond_in_size"]:
        given["cond_id"] = ids.tolist()
        z = (uncond, ids) if given.get("uncond_input") is not None else ids
    else:
        z = uncond
    with torch.no_grad():
        wanted = theirs.forward(**given)
        ours = net(z)
        for weight, theirs_of_all in zip(ours.values(), zip(*wanted)):
            torch.testing.assert_close(form(weight), torch.stack(theirs_of_all), rtol=1e-6, atol=1e-6)
        x = torch.randn(3, 7, 10)
        y = F.linear(F.linear(x, ours["0"], ours["1"]).relu(), ours["2"], ours["3"])
        layers = [torch.stack([w[n] for w in wanted]) for n in range(4)]
        hidden = (x @ layers[0].mT + layers[1][:, None]).relu()
        torch.testing.assert_close(y, hidden @ layers[2].mT + layers[3][:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("uncond_in_size", [0, 3])
def test_inputs_around_the_chunk_embedding(uncond_in_size):
    """Where no embeddings of tasks tell, the state does not say which columns are the chunk's."""
    settings = {"cond_in_size": 8, "num_cond_embs": 0, "uncond_in_size": uncond_in_size}
    theirs = hnets.ChunkedHMLP(SHAPES, 42, **settings, **COMMON)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with pytest.raises(ValueError, match="cond_in_size: got None"):
        read_hypnettorch(theirs.state_dict(), SHAPES)
    net = read_hypnettorch(theirs.state_dict(), SHAPES, cond_in_size=8)
    uncond, cond = torch.randn(3, uncond_in_size), torch.randn(3, 8)
    given = {"uncond_input": uncond} if uncond_in_size else {}
    with torch.no_grad():
        wanted = theirs.forward(cond_input=cond, **given)
        for weight, of_all in zip(net(torch.cat([uncond, cond], 1)).values(), zip(*wanted)):
            torch.testing.assert_close(form(weight), torch.stack(of_all), rtol=1e-6, atol=1e-6)


def test_what_is_missing_or_extra_is_refused():
    theirs, _ = make("ChunkedHMLP, tasks")
    state = dict(theirs.state_dict())
    with pytest.raises(ValueError, match="targets: got 240 weights, wanted"):
        read_hypnettorch(state, [*SHAPES[:2], [20]])
    for key, match in (("_layer_weight_tensors.1", "_layer_weight_tensors.1"), ("_layer_bias_vectors.2", "2 biases")):
        with pytest.raises(ValueError, match=match):
            read_hypnettorch({name: value for name, value in state.items() if name != key}, SHAPES)
    with pytest.raises(ValueError, match="batchnorm"):
        read_hypnettorch(state | {"_batchnorm_layers.0.weight": torch.ones(3)}, SHAPES)
    of_tasks = hnets.ChunkedHMLP(SHAPES, 42, cond_chunk_embs=True, cond_in_size=8, num_cond_embs=3, **COMMON)
    with pytest.raises(ValueError, match="internal tensor"):
        read_hypnettorch(of_tasks.state_dict(), SHAPES)
    for key in ("_hnet._layer_weight_tensors.1", f"_internal_params.{len(list(theirs.internal_params)) - 1}"):
        with pytest.raises(ValueError, match=r"state: got"):
            read_hypnettorch({name: value for name, value in state.items() if name != key}, SHAPES)
    with pytest.raises(ValueError, match=r"state: got _layer_weight_tensors.1 of shape"):
        read_hypnettorch(state | {"_hnet._layer_weight_tensors.1": torch.ones(2, 2)}, SHAPES)
    with pytest.raises(ValueError, match="cond_in_size: got 5, wanted 8"):
        read_hypnettorch(state, SHAPES, cond_in_size=5)
    whole, _ = make("HMLP, tasks")
    for fewer in (SHAPES[:2], [[3, 3]]):
        with pytest.raises(ValueError, match="targets: got"):
            read_hypnettorch(whole.state_dict(), fewer)


def test_every_twin_is_looked_at():
    theirs, _ = make("ChunkedHMLP, tasks")
    state = dict(theirs.state_dict())
    refused = []
    for key in [key for key in state if key.startswith("_hnet.")]:
        refused.append({name: value for name, value in state.items() if name != key})
        refused.append(state | {key: state[key] + 1})
    refused += [state | {"_hnet.colour": torch.ones(2)}, state | {"_layer_bias_vectors.0": torch.ones(3)}]
    whole = dict(make("HMLP, tasks")[0].state_dict())
    refused += [whole | {key: torch.ones(3)} for key in whole if key.startswith("_internal")][4:]
    for damaged in refused:
        with pytest.raises(ValueError, match=r"state: got|state: wanted"):
            read_hypnettorch(damaged, SHAPES)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((None, SHAPES), "state: got NoneType"),
        (({"a": 3}, SHAPES), "state: got dict"),
        (({}, None), "targets: got None"),
        (({}, [3, 4]), r"targets: got \[3, 4\]"),
    ],
)
def test_what_is_no_state_or_no_shapes_is_named(given, match):
    with pytest.raises(TypeError, match=match):
        read_hypnettorch(*given)
