"""Routing, padding, memory and threads of CUDA graphs. Without a GPU a stand-in re-runs the function."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from small_model import small_model
from test_model import BOXES, LABELS, POINTS, pixels

from fastsam_rwkv import RWKVSAM
from fastsam_rwkv.modeling import cuda_graphs, graphed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class Rerun:
    """Stand-in for a graph: it copies inputs in and overwrites its outputs at the next call."""

    def __init__(self, function, inputs, generation):
        self.function, self.inputs, self.copies = function, inputs, []
        self.outputs = function(None, *self.inputs.tensors)

    def __call__(self, inputs):
        self.copies.append(self.inputs.renew(inputs))
        for mine, new in zip(self.outputs, self.function(None, *self.inputs.tensors), strict=True):
            mine.copy_(new)
        with torch.inference_mode(False), torch.no_grad():
            return tuple(t.clone() for t in self.outputs)


class InTurn:
    """Stand-in for the side stream that runs the function at once."""

    def __init__(self, stream):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, function, *inputs):
        self.result = function(*inputs)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_Graph", Rerun)
    monkeypatch.setattr(cuda_graphs, "create_stream", lambda device: "stream")
    monkeypatch.setattr(cuda_graphs._Generation, "_spare", {})
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(graphed, "SideStream", InTurn)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(RWKVSAM, "_use_graph", lambda self, *tensors: self.cuda_graphs)


def both_ways(model, **prompts):
    """Return results without and with graphs."""
    results = []
    for model.cuda_graphs in (False, True):
        with torch.inference_mode():
            embedding = model.encode_image(pixels().to(model.device))
            results.append((*model.decode_masks(embedding, **prompts), embedding.image_embed))
    return results


MASK = torch.randn(3, 1, 24, 32, generator=torch.Generator().manual_seed(1))
PROMPTS = [
    {"boxes": BOXES},
    {"boxes": BOXES[:1]},
    {"point_coords": POINTS, "point_labels": LABELS},
    {"point_coords": POINTS[:, :1], "point_labels": LABELS[:, :1].int(), "boxes": BOXES.double()},
    {"point_coords": POINTS, "point_labels": torch.where(LABELS == 0, -1, LABELS), "mask_input": MASK},
    {"mask_input": MASK},
    {"boxes": BOXES, "multimask_output": True},
]


def pretended(device):
    """A tensor on CUDA, as far as `_use_graph` looks, whose device is `device`."""
    return SimpleNamespace(is_cuda=True, requires_grad=False, device=device)


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda p: "+".join(p))
def test_padding_to_a_bucket_does_not_change_masks(prompts, graphs_on_cpu):
    for plain, replayed in zip(*both_ways(small_model(), **prompts), strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


def test_the_reference_is_not_recorded(monkeypatch):
    """The reference serves on CUDA if Triton is missing, and it reads values."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = small_model().requires_grad_(False)
    on_cuda = pretended(model.device)
    for there in (True, False):
        monkeypatch.setattr(graphed, "HAS_TRITON", there)
        assert model._use_graph(on_cuda) is there


def test_no_graph_for_tensors_on_another_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = small_model().requires_grad_(False)
    assert model._use_graph(pretended(model.device)) is graphed.HAS_TRITON
    assert not model._use_graph(pretended(torch.device("cuda:1")))  # the kernels name both devices in an error


def test_no_graph_if_any_tensor_requires_a_gradient(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = small_model().requires_grad_(False)
    on_cuda = pretended(model.device)
    wanted = torch.zeros(1, requires_grad=True)
    assert model._use_graph(on_cuda, None) and not model._use_graph(on_cuda, None, wanted)
    model.backbone.norm.requires_grad_(True)
    assert not model._use_graph(on_cuda)
    with torch.no_grad():
        assert model._use_graph(on_cuda, wanted)
    model.requires_grad_(False).load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert model._use_graph(on_cuda)
    model.neck.requires_grad_(True)  # parameters that were not there before
    assert not model._use_graph(on_cuda)


def test_no_graph_while_a_module_has_hooks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = small_model().requires_grad_(False)
    on_cuda = pretended(model.device)
    assert model._use_graph(on_cuda) is graphed.HAS_TRITON
    for register in (
        model.backbone.layers[1].channel_mix.key.register_forward_hook,
        model.mask_decoder.upscale.register_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *_: None)
        assert not model._use_graph(on_cuda)
        handle.remove()
        assert model._use_graph(on_cuda) is graphed.HAS_TRITON


def test_more_prompts_than_one_graph_holds(graphs_on_cpu, monkeypatch):
    monkeypatch.setattr(graphed, "MAX_PROMPTS", 2)
    for plain, replayed in zip(*both_ways(small_model(), boxes=BOXES), strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_buckets_limit_the_number_of_graphs(graphs_on_cpu):
    model = small_model()
    embedding = model.encode_image(pixels())
    kept = model.encode_image(pixels()).image_embed
    before = kept.clone()
    model.encode_image(2 * pixels())
    assert torch.equal(kept, before)  # the caller's own, not the graph's
    for count in range(1, 16):
        model.decode_masks(embedding, POINTS[:1, :1].expand(1, count, 2), torch.ones(1, count, dtype=torch.long))
    assert len(model._graphed._graphs) == 1 + 4  # the encoder's, and 2, 4, 8 and 16 tokens
    for n in range(1, 10):
        model.decode_masks(embedding, boxes=BOXES[:1].expand(n, 4))
    assert (
        len(model._graphed._graphs) == 1 + 4 + 4
    )  # 2, 4, 8 and 16 prompts of 2 tokens beside the one prompt there was


def test_images_of_any_shape_share_a_graph_in_every_mode(graphs_on_cpu):
    model = small_model().requires_grad_(False)
    for h, w in ((50, 96), (96, 33), (96, 96), (7, 96)):
        image = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8)
        results = []
        for model.cuda_graphs in (False, True):
            with torch.inference_mode(h == 50):  # what is recorded under one mode serves under the other
                results.append(model.encode_image(image, (96, 96)).image_embed)
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert len(model._graphed._graphs) == 2  # whole images, and padded ones


@torch.inference_mode()
def test_maps_of_an_image_are_copied_once(graphs_on_cpu):
    model = small_model()
    embedding = model.encode_image(torch.cat([pixels(), 2 * pixels()]))
    prompt = {"point_coords": POINTS[:1], "point_labels": LABELS[:1]}

    def copies(image):
        (graph,) = (g for key, g in model._graphed._graphs._generations[0].graphs.items() if key[0][0] == "decode")
        model.cuda_graphs = False
        want = model.decode_masks(image, **prompt)[0]
        model.cuda_graphs = True
        torch.testing.assert_close(model.decode_masks(image, **prompt)[0], want, rtol=1e-4, atol=1e-5)
        return graph.copies[-1]

    model.decode_masks(embedding[0], **prompt)
    assert [copies(embedding[i]) for i in (0, 1, 1, 0)] == [2, 4, 2, 4]  # points and labels, and two maps of the image
    embedding.high_res_feats.mul_(2)
    assert copies(embedding[0]) == 3 and copies(embedding[0]) == 2
    other = model.encode_image(pixels())
    assert copies(other[0]) == 4 and copies(other[0]) == 2
    del other
    gc.collect()
    assert copies(model.encode_image(3 * pixels())[0]) == 4  # even if the memory is the same
    copied = embedding.to(torch.float64).to(torch.float32)  # inference tensors
    assert copied.image_embed.is_inference() and [copies(copied[0]) for _ in range(2)] == [5, 5]


def test_no_prompts_give_no_masks(graphs_on_cpu):
    for low, iou, _ in both_ways(small_model(), boxes=BOXES[:0]):
        assert low.shape == (0, 1, 24, 32) and iou.shape == (0, 1)


def test_changed_weights_reset_the_graphs(graphs_on_cpu):
    model, other = small_model(), small_model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
        model.encode_image(pixels())
        assert len(model._graphed._graphs) == 1
        model.load_state_dict(other.state_dict(), assign=True)
        assert len(model._graphed._graphs) == 0
        torch.testing.assert_close(model.encode_image(pixels()).image_embed, other.encode_image(pixels()).image_embed)
        model.to(torch.bfloat16)
        assert len(model._graphed._graphs) == 0 and model.encode_image(pixels()).image_embed.dtype == torch.bfloat16


@torch.no_grad()
def test_a_graph_serves_one_choice_of_kernels(graphs_on_cpu):
    model = small_model()
    decay = model.backbone.layers[1].spatial_mix.decay
    for factor, graphs in ((1, 1), (1.001, 1), (1000, 2), (1e-3, 2)):
        decay.mul_(factor)
        got = model.encode_image(pixels()).image_embed
        assert len(model._graphed._graphs) == graphs
        model.cuda_graphs = False
        torch.testing.assert_close(got, model.encode_image(pixels()).image_embed, rtol=1e-4, atol=1e-5)
        model.cuda_graphs = True


def test_threads_get_their_own_results(graphs_on_cpu):
    model = small_model()
    with torch.inference_mode():
        embedding = model.encode_image(pixels())

    def decode(i):
        with torch.inference_mode():
            return model.decode_masks(embedding, boxes=BOXES[i % 3 : i % 3 + 1])[0]

    want = [decode(i) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for i, low in enumerate(pool.map(decode, range(24))):
            torch.testing.assert_close(low, want[i % 3])


def test_copies_and_pickles_have_their_own_graphs(graphs_on_cpu):
    model = small_model()
    with torch.no_grad():
        want = model.encode_image(pixels()).image_embed
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(other._graphed._graphs) == 0
            torch.testing.assert_close(other.encode_image(pixels()).image_embed, want)


def test_no_graph_with_gradients_or_on_a_cpu():
    model = small_model()
    assert not model._use_graph(torch.zeros(1))
    model.encode_image(pixels())
    assert len(model._graphed._graphs) == 0


def test_without_a_recording_the_model_runs_as_usual(graphs_on_cpu, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no memory for a graph")

    monkeypatch.setattr(cuda_graphs, "_Graph", refuse)
    with pytest.warns(RuntimeWarning, match="no memory for a graph"):
        for plain, other in zip(*both_ways(small_model(), boxes=BOXES), strict=True):
            assert torch.equal(plain, other)


@needs_gpu
@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda p: "+".join(p))
def test_on_a_gpu(prompts):
    model = small_model().cuda()
    depthwise = model.backbone.stage1[0].depthwise.weight
    assert depthwise.permute(2, 3, 1, 0).is_contiguous()  # as the kernels read it
    prompts = {name: p.cuda() if isinstance(p, torch.Tensor) else p for name, p in prompts.items()}
    for _ in range(2):  # recording, then replaying
        for plain, replayed in zip(*both_ways(model, **prompts), strict=True):
            torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-4)
    assert len(model._graphed._graphs) == 2
