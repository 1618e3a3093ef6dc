"""Makes the golden files of the Mamba backbone: python tests/golden/make_golden.py

mamba_fp32.h5        transformers' MambaModel on the CPU (the path without custom kernels), in fp32
mamba_fp64.h5        the plain scan below in fp64, on the same weights and input
mamba_fp64_reset.h5  the plain scan with initial states and resets, which the public model does not have

Each file holds the weights by their public names, input, output, the weighting of the output whose sum is the
loss, the gradient of every weight and of the input, and the caches after stepping through the input one by one.
Sequences are [T, B, d_model]; the caches keep their owner's layout: the public model's conv_state is
[B, d_inner, d_conv], the plain scan's is [B, d_conv - 1, d_inner].

In fp64 the plain scan stands in for the public model, which casts A_log, dt_proj.bias, B and the inputs of its
norms to fp32. The script stops unless the two agree in fp32.
"""

import pathlib
import platform

import h5py
import torch
import torch.nn.functional as F
import transformers
from transformers import MambaConfig, MambaModel

TRANSFORMERS = "5.23.0"
T, BATCH = 13, 3
CONFIG = dict(d_model=20, d_state=8, d_conv=4, expand=2, dt_rank=2, n_layers=2)
EPS = 1e-5


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def public_model():
    torch.manual_seed(1)
    model = MambaModel(
        MambaConfig(
            vocab_size=2,
            hidden_size=CONFIG["d_model"],
            state_size=CONFIG["d_state"],
            conv_kernel=CONFIG["d_conv"],
            expand=CONFIG["expand"],
            time_step_rank=CONFIG["dt_rank"],
            num_hidden_layers=CONFIG["n_layers"],
            layer_norm_epsilon=EPS,
        )
    ).eval()
    del model.embeddings
    with torch.no_grad():  # nothing may stay at a value that hides a mistake: ones, zeros, equal rows
        for i, p in enumerate(model.parameters()):
            p += 0.2 * normal(*p.shape, seed=100 + i).float()
    return model


def run_public(model, x):
    """Output, and the caches after one step at a time; x [T, B, d_model]."""
    y = model(inputs_embeds=x.transpose(0, 1), use_cache=False).last_hidden_state.transpose(0, 1)
    cache, steps = None, []
    with torch.no_grad():
        for x_t in x:
            out = model(inputs_embeds=x_t[:, None], cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.last_hidden_state[:, 0])
    assert relative(torch.stack(steps), y) < 1e-5
    caches = {}
    for i, layer in enumerate(cache.layers):
        caches[f"layers.{i}.conv"] = layer.conv_states[0]
        caches[f"layers.{i}.ssm"] = layer.recurrent_states[0]
    return y, caches


def plain_mixer(w, x, conv, ssm, reset):
    """One block over time. x [T, B, d_model], conv [B, K - 1, d_inner], ssm [B, d_inner, N], reset [T, B]."""
    A = -w["A_log"].exp()
    ys = []
    for x_t, reset_t in zip(x, reset):
        clear = reset_t[:, None, None]
        conv = torch.where(clear, torch.zeros_like(conv), conv)
        ssm = torch.where(clear, torch.zeros_like(ssm), ssm)
        u, z = (x_t @ w["in_proj.weight"].T).chunk(2, -1)
        window = torch.cat([conv, u[:, None]], 1)
        conv = window[:, 1:]
        u = F.silu((window * w["conv1d.weight"][:, 0].T).sum(1) + w["conv1d.bias"])
        dt, B, C = (u @ w["x_proj.weight"].T).split([w["dt_proj.weight"].shape[1], A.shape[1], A.shape[1]], -1)
        delta = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])[:, :, None]
        ssm = (delta * A).exp() * ssm + delta * B[:, None] * u[:, :, None]
        y = (ssm * C[:, None]).sum(-1) + w["D"] * u
        ys.append((y * F.silu(z)) @ w["out_proj.weight"].T)
    return torch.stack(ys), conv, ssm


def plain_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def run_plain(weights, x, initial, reset):
    y, caches = x, {}
    for i in range(CONFIG["n_layers"]):
        prefix = f"layers.{i}.mixer."
        w = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
        normed = plain_norm(y, weights[f"layers.{i}.norm.weight"])
        out, conv, ssm = plain_mixer(w, normed, initial[f"layers.{i}.conv"], initial[f"layers.{i}.ssm"], reset)
        y = y + out
        caches |= {f"layers.{i}.conv": conv, f"layers.{i}.ssm": ssm}
    return plain_norm(y, weights["norm_f.weight"]), caches


def initial_state(seed=None):
    d_inner = CONFIG["expand"] * CONFIG["d_model"]
    state = {}
    for i in range(CONFIG["n_layers"]):
        for part, shape in (("conv", (CONFIG["d_conv"] - 1, d_inner)), ("ssm", (d_inner, CONFIG["d_state"]))):
            value = torch.zeros(BATCH, *shape, dtype=torch.float64)
            if seed is not None:
                value = normal(BATCH, *shape, seed=seed + len(state))
            state[f"layers.{i}.{part}"] = value.requires_grad_()
    return state


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def write(name, **groups):
    with h5py.File(pathlib.Path(__file__).parent / name, "w") as file:
        file.attrs["transformers"] = transformers.__version__
        file.attrs["torch"] = str(torch.__version__)
        file.attrs["python"] = platform.python_version()
        for key, value in CONFIG.items():
            file[f"config/{key}"] = value
        for group, value in groups.items():
            for key, tensor in value.items() if isinstance(value, dict) else [(None, value)]:
                file[f"{group}/{key}" if key else group] = tensor.detach().contiguous().numpy()
    print(f"wrote {name}")


def gradients(y, weighting, weights, x):
    (y * weighting).sum().backward()
    return dict(gradients={name: p.grad for name, p in weights.items()}, input_gradient=x.grad)


def main():
    assert transformers.__version__ == TRANSFORMERS, f"pip install transformers=={TRANSFORMERS}"
    model = public_model()
    weights = dict(model.named_parameters())
    x = normal(T, BATCH, CONFIG["d_model"], seed=2).float().requires_grad_()
    weighting = normal(T, BATCH, CONFIG["d_model"], seed=3).float()
    y, cache = run_public(model, x)
    public = gradients(y, weighting, weights, x)
    write("mamba_fp32.h5", weights=weights, input=x, output=y, weighting=weighting, cache=cache, **public)

    wide = {name: p.detach().double().requires_grad_() for name, p in weights.items()}
    x64 = x.detach().double().requires_grad_()
    no_reset = torch.zeros(T, BATCH, dtype=torch.bool)
    y64, cache64 = run_plain(wide, x64, initial_state(), no_reset)
    plain = gradients(y64, weighting.double(), wide, x64)
    write("mamba_fp64.h5", weights=wide, input=x64, output=y64, weighting=weighting.double(), cache=cache64, **plain)

    errors = {"output": relative(y, y64), "input": relative(x.grad, x64.grad)}
    errors |= {name: relative(p.grad, wide[name].grad) for name, p in weights.items()}
    for key, value in cache64.items():
        same_layout = cache[key][:, :, 1:].transpose(1, 2) if key.endswith("conv") else cache[key]
        errors[f"cache {key}"] = relative(same_layout, value)
    worst = max(errors, key=errors.get)
    print(f"the public model and the plain scan differ by {errors[worst]:.1e} at most ({worst})")
    assert errors[worst] < 1e-5

    wide = {name: p.detach().clone().requires_grad_() for name, p in wide.items()}
    x64 = x64.detach().clone().requires_grad_()
    initial = initial_state(seed=10)
    reset = no_reset.clone()
    reset[0, 1] = reset[4, 0] = reset[5, 0] = reset[9, 1] = reset[T - 1, 2] = True
    y64, cache64 = run_plain(wide, x64, initial, reset)
    end_weighting = {name: normal(*value.shape, seed=50 + i) for i, (name, value) in enumerate(cache64.items())}
    end = sum((cache64[name] * end_weighting[name]).sum() for name in cache64)
    end.backward(retain_graph=True)  # gradients() adds the output's share
    plain = gradients(y64, weighting.double(), wide, x64)
    write("mamba_fp64_reset.h5", weights=wide, input=x64, output=y64, weighting=weighting.double(), cache=cache64,
          initial_state=initial, reset=reset.to(torch.uint8), cache_weighting=end_weighting,
          initial_state_gradients={name: value.grad for name, value in initial.items()}, **plain)


if __name__ == "__main__":
    main()
