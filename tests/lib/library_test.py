"""The ops from Python, after torch.ops.load_library: values, gradients, torch.compile, export, meta tensors.

Usage: library_test.py path/to/libretain.so [unittest options]. Exits with 77 (skipped) where this Python has no torch.
"""

import sys
import unittest

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("skipped: this Python has no torch")
    sys.exit(77)

torch.ops.load_library(sys.argv.pop(1))
torch.set_num_threads(1)
ops = torch.ops.retain


def randn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


def scan_arguments(T=19, B=3, D=6, N=4, G=2):
    arguments = dict(
        u=randn(T, B, D, seed=1), delta=randn(T, B, D, seed=2), A=-randn(D, N, seed=3).exp(), B=randn(T, B, G, N, seed=4),
        C=randn(T, B, G, N, seed=5), D=randn(D, seed=6), z=randn(T, B, D, seed=7), delta_bias=randn(D, seed=8),
        delta_softplus=True, initial_state=randn(B, D, N, seed=9))
    arguments["A"] = arguments["A"].detach().requires_grad_()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[5, 0] = reset[17, 2] = True
    return dict(arguments, reset=reset)


def update_arguments(B=3, D=8, N=4, R=3, K=4):
    return dict(
        xz=randn(B, 2 * D, seed=1), conv_state=randn(B, K - 1, D, seed=2), ssm_state=randn(B, D, N, seed=3),
        conv_weight=randn(D, K, seed=4), conv_bias=randn(D, seed=5), x_proj_weight=randn(R + 2 * N, D, seed=6),
        dt_proj_weight=randn(D, R, seed=7), dt_proj_bias=randn(D, seed=8), A_log=randn(D, N, seed=9), D=randn(D, seed=10),
        reset=torch.arange(B) == 1)


def plain_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset):
    h, outputs = initial_state, []
    delta = F.softplus(delta + delta_bias)
    for t in range(u.shape[0]):
        h = torch.where(reset[t][:, None, None], 0, h)
        b, c = (x[t].repeat_interleave(u.shape[2] // x.shape[2], 1) for x in (B, C))
        h = torch.exp(delta[t, :, :, None] * A) * h + (delta[t] * u[t])[:, :, None] * b
        outputs.append((h * c).sum(-1) + D * u[t])
    return torch.stack(outputs) * F.silu(z), h


def gradients(outputs, inputs):
    return torch.autograd.grad(sum((y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum() for y in outputs),
                               [x for x in inputs if x is not None and x.requires_grad])


class OpTest(unittest.TestCase):
    def same(self, op, plain, arguments):
        """Outputs and gradients of the op and of its plain composition."""
        values = list(arguments.values())
        inputs = [x for x in values if isinstance(x, torch.Tensor)]
        got, expected = op(**arguments), plain(**arguments)
        torch.testing.assert_close(list(got), list(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients(got, inputs), gradients(expected, inputs), rtol=1e-3, atol=1e-4)

    def check(self, op, arguments):
        """Schema, fake tensors, autograd registration, tracing forward and backward."""
        result = torch.library.opcheck(op.default, (), arguments)
        self.assertEqual(set(result.values()), {"SUCCESS"}, result)

    def compiled_scan_equals_eager(self, arguments, dynamic=None):
        def function(arguments):
            y, last_state = ops.selective_scan(**arguments)
            return y.square(), last_state

        inputs = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        expected = function(arguments)
        got = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)(arguments)
        for a, b in zip(got + tuple(gradients(got, inputs)), expected + tuple(gradients(expected, inputs))):
            self.assertTrue(torch.equal(a, b))


class Library(OpTest):
    def test_selective_scan(self):
        self.same(ops.selective_scan, plain_scan, scan_arguments())
        self.check(ops.selective_scan, scan_arguments())

    def test_selective_scan_with_what_must_be_there_only(self):
        full = scan_arguments()
        u, delta, A, B, C = (full[name] for name in ("u", "delta", "A", "B", "C"))
        y, last_state = ops.selective_scan(u, delta.exp(), A, B, C)
        zero = torch.zeros(())
        expected = plain_scan(u, delta.exp().expm1().log(), A, B, C, zero, zero, zero, True, torch.zeros_like(last_state),
                              torch.zeros(u.shape[:2], dtype=torch.bool))
        torch.testing.assert_close(last_state, expected[1], rtol=1e-4, atol=1e-5)
        self.assertEqual(y.shape, u.shape)

    def test_selective_scan_update(self):
        a = scan_arguments()
        y, last_state = ops.selective_scan(**a)
        state, outputs = a["initial_state"], []
        for t in range(y.shape[0]):
            step, state = ops.selective_scan_update(a["u"][t], a["delta"][t], a["A"], a["B"][t], a["C"][t], state, a["D"],
                                                    a["z"][t], a["delta_bias"], True, a["reset"][t])
            outputs.append(step)
        self.assertTrue(torch.equal(torch.stack(outputs), y))
        self.assertTrue(torch.equal(state, last_state))

    def test_selective_scan_fwd_with_state(self):
        a = scan_arguments()
        inputs = [a[name] for name in ("u", "delta", "A", "B", "C", "D", "initial_state")]
        out, last_state = ops.selective_scan_fwd_with_state(*inputs, True, True)
        expected = ops.selective_scan(*inputs[:6], delta_softplus=True, initial_state=inputs[6])
        self.assertTrue(torch.equal(out, expected[0]) and torch.equal(last_state, expected[1]))
        self.assertTrue(all(g.abs().sum() > 0 for g in gradients([out, last_state], inputs)))
        self.assertIsNone(ops.selective_scan_fwd_with_state(*inputs, True, False)[1])

    def test_causal_conv1d(self):
        def plain(x, weight, bias, silu, initial_state):
            padded = torch.cat([initial_state.transpose(0, 1), x])
            y = F.conv1d(padded.permute(1, 2, 0), weight[:, None], bias, groups=weight.shape[0]).permute(2, 0, 1)
            return F.silu(y), padded[x.shape[0]:].transpose(0, 1)

        arguments = dict(x=randn(9, 3, 5, seed=1), weight=randn(5, 4, seed=2), bias=randn(5, seed=3), silu=True,
                         initial_state=randn(3, 3, 5, seed=4))
        self.same(ops.causal_conv1d, plain, arguments)
        self.check(ops.causal_conv1d, arguments)

    def test_rms_norm(self):
        def plain(x, weight, residual):
            total = x + residual
            return F.rms_norm(total, weight.shape, weight, 1e-5), total

        arguments = dict(x=randn(9, 3, 8, seed=1), weight=randn(8, seed=2), residual=randn(9, 3, 8, seed=3))
        self.same(ops.rms_norm, plain, arguments)
        self.check(ops.rms_norm, arguments)

    def test_mamba_update(self):
        self.check(ops.mamba_update, update_arguments())
        self.check(ops.mamba_update_, {k: x.detach() for k, x in update_arguments().items()})

    def test_gru(self):
        def plain(x, w_ih, w_hh, b_ih, b_hh, initial_state):
            y, last = torch.gru(x, initial_state[None], [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, False, False, False)
            return y, last[0]

        arguments = dict(x=randn(9, 3, 4, seed=1), w_ih=randn(15, 4, seed=2), w_hh=randn(15, 5, seed=3), b_ih=randn(15, seed=4),
                         b_hh=randn(15, seed=5), initial_state=randn(3, 5, seed=6))
        self.same(ops.gru, plain, arguments)
        self.check(ops.gru, arguments)

    def test_compiled_scan_equals_eager(self):
        self.compiled_scan_equals_eager(scan_arguments())

    def test_compiled_scan_takes_any_length(self):
        def function(arguments):
            return ops.selective_scan(**arguments)[0]

        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for T in (19, 33):
            arguments = scan_arguments(T=T)
            self.assertTrue(torch.equal(compiled(arguments), function(arguments)))

    def test_exported_scan_equals_eager(self):
        class Scan(torch.nn.Module):
            def forward(self, u, delta, A, B, C):
                return ops.selective_scan(u, delta, A, B, C, delta_softplus=True)

        inputs = tuple(scan_arguments()[name].detach() for name in ("u", "delta", "A", "B", "C"))
        exported = torch.export.export(Scan(), inputs).module()
        torch.testing.assert_close(exported(*inputs), Scan()(*inputs), rtol=0, atol=0)

    def test_meta_tensors_give_the_shapes(self):
        def on_meta(arguments):
            return {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}

        shapes = [tuple(y.shape) for y in ops.selective_scan(**on_meta(scan_arguments()))]
        self.assertEqual(shapes, [(19, 3, 6), (3, 6, 4)])
        self.assertEqual(ops.causal_conv1d(torch.empty(7, 2, 4, device="meta"), torch.empty(4, 3, device="meta"))[1].shape, (2, 2, 4))
        self.assertEqual(ops.rms_norm(torch.empty(7, 2, 4, device="meta"), torch.empty(4, device="meta"))[0].shape, (7, 2, 4))
        self.assertEqual(ops.gru(torch.empty(7, 2, 4, device="meta"), torch.empty(9, 4, device="meta"), torch.empty(9, 3, device="meta"),
                                 None, None)[0].shape, (7, 2, 3))

    def test_errors_name_the_argument(self):
        arguments = dict(scan_arguments(), delta=torch.zeros(2, 3))
        with self.assertRaisesRegex(RuntimeError, r"selective_scan: delta must be \[T, B, d_inner\] = \[19, 3, 6\], got \[2, 3\]"):
            ops.selective_scan(**arguments)

    def test_autocast_narrows_activations_and_keeps_memory_wide(self):
        arguments = scan_arguments()
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            moved = to_device(arguments, device)
            with torch.autocast(device, torch.bfloat16):
                y, last_state = ops.selective_scan(**moved)
            self.assertEqual((y.dtype, last_state.dtype), (torch.bfloat16, torch.float32))
            narrow = {k: moved[k].to(torch.bfloat16) for k in ("u", "delta", "B", "C", "z")}
            expected = ops.selective_scan(**dict(moved, **narrow))
            self.assertTrue(torch.equal(y, expected[0]) and torch.equal(last_state, expected[1]))
            x, weight = randn(9, 3, 5, seed=1).to(device), randn(5, 4, seed=2).to(device)
            with torch.autocast(device, torch.bfloat16):
                y, last_state = ops.causal_conv1d(x, weight)
            expected = ops.causal_conv1d(x.to(torch.bfloat16), weight)
            self.assertEqual((y.dtype, last_state.dtype), (torch.bfloat16, torch.float32))
            self.assertTrue(torch.equal(y, expected[0]) and torch.equal(last_state, expected[1]))

    def test_autocast_narrows_the_acting_step(self):
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            update = {name: x.detach() for name, x in to_device(update_arguments(D=32, N=16), device).items()}
            narrow = dict(update, xz=update["xz"].to(torch.bfloat16))
            with torch.autocast(device, torch.bfloat16):
                outputs = ops.mamba_update(**update)
                compiled = torch.compile(lambda **a: ops.mamba_update(**a), backend="aot_eager")(**update)
                states = [update[name].clone() for name in ("conv_state", "ssm_state")]
                y = ops.mamba_update_(**dict(update, conv_state=states[0], ssm_state=states[1]))
            for got, same, in_place, expected in zip(outputs, compiled, (y, *states), ops.mamba_update(**narrow)):
                self.assertEqual((got.dtype, same.dtype, in_place.dtype), (expected.dtype,) * 3)
                self.assertTrue(all(torch.equal(x, expected) for x in (got, same, in_place)))

    def test_a_backward_keeps_little_whatever_d_state(self):
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for N in (4, 16, 20, 24, 32, 64, 128, 256):
                    a = to_device(scan_arguments(T=256, N=N), device)
                    for name in ("u", "delta", "B", "C", "z"):
                        a[name] = a[name].detach().to(dtype).requires_grad_()
                    given = {x.untyped_storage().data_ptr() for x in a.values() if isinstance(x, torch.Tensor)}
                    kept = {}

                    def keep(x):
                        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                        return x

                    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                        outputs = ops.selective_scan(**a)
                    given |= {x.untyped_storage().data_ptr() for x in outputs}
                    extra = sum(size for place, size in kept.items() if place not in given)
                    with self.subTest(device=device, dtype=dtype, N=N):
                        self.assertLessEqual(extra, 1.25 * a["u"].nbytes)


def to_device(arguments, device):
    """The arguments as leaves on a device."""
    def move(x):
        return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    return {name: move(x) for name, x in arguments.items()}


def training_step(arguments):
    """A function that gives the scan's outputs and gradients."""
    inputs = [x for x in arguments.values() if isinstance(x, torch.Tensor)]

    def step():
        outputs = ops.selective_scan(**arguments)
        return [*outputs, *gradients(outputs, inputs)]

    return step


def capture(step):
    """step in a CUDA graph, and what it returned there."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


class Shapes(unittest.TestCase):
    def test_backward_of_transposed_weights_is_dense_as_meta_says(self):
        x, dy = randn(5, 2, 8, seed=1), randn(5, 2, 8, seed=2)
        weight, state = randn(4, 8, seed=3).t(), randn(2, 3, 8, seed=4)

        def backward(device):
            on = [t.detach().to(device) for t in (dy, state, x, weight, state)]
            return ops.causal_conv1d_bwd(on[0], on[1], on[2], on[3], None, True, on[4], None)

        for real, meta in zip(backward("cpu"), backward("meta")):
            self.assertEqual((real.shape, real.stride()), (meta.shape, meta.stride()))

    def test_gru_backward_is_dense_as_meta_says(self):
        for H in (1, 8):
            tensors = [randn(*shape, seed=i).detach() for i, shape in enumerate([(5, 2, H), (5, 2, 3), (3 * H, 3), (3 * H, H)])]
            y, last, gates = ops.gru_fwd(*tensors[1:], None, None, None, None, True)

            def backward(device):
                dy, x, w_ih, w_hh, y_, gates_ = (t.to(device) for t in [*tensors, y, gates])
                return ops.gru_bwd(dy, None, x, w_ih, w_hh, None, None, y_, gates_, True)

            for real, meta in zip(backward("cpu"), backward("meta")):
                self.assertEqual((real.shape, real.stride()), (meta.shape, meta.stride()))

    def test_saved_tensors_may_come_back_in_another_layout(self):
        def moved(t):
            return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t

        x, w_ih, w_hh = randn(9, 2, 3, seed=1), randn(24, 3, seed=2), randn(24, 8, seed=3)
        scan = scan_arguments(T=40)
        for run, inputs in ((lambda: ops.gru(x, w_ih, w_hh, None, None), [x, w_ih, w_hh]),
                            (lambda: ops.selective_scan(**scan), [t for t in scan.values() if isinstance(t, torch.Tensor)])):
            expected = gradients(run(), inputs)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved):
                outputs = run()
                got = gradients(outputs, inputs)
            for g, e in zip(got, expected):
                self.assertTrue(torch.equal(g, e))

    def test_norm_backward_reads_any_layout(self):
        total, dy = randn(3, 5, 8, seed=1).detach().transpose(0, 1), randn(5, 3, 8, seed=2).detach()
        for got, expected in zip(ops.rms_norm_bwd(dy, None, total, torch.ones(8), 1e-5),
                                 ops.rms_norm_bwd(dy, None, total.contiguous(), torch.ones(8), 1e-5)):
            self.assertTrue(torch.equal(got, expected))

    def test_state_parts_that_do_not_fit_are_named(self):
        a, b = torch.ones(4, 2), torch.ones(4, 3)
        for error, call in (
                ("copy_parts: there must be a target for each part", lambda: ops.copy_parts([a, b], [a])),
                ("zero_rows: each part must be", lambda: ops.zero_rows([a], torch.ones(8, dtype=torch.bool))),
                ("zero_rows: mask must be", lambda: ops.zero_rows([a], torch.ones(4)))):
            with self.assertRaisesRegex(RuntimeError, error):
                call()

    def test_backward_passes_name_what_does_not_fit(self):
        u, A, B, z = torch.ones(20, 1, 3), -torch.ones(3, 2), torch.ones(20, 1, 1, 2), torch.ones(20, 1, 3)
        _, _, kept = ops.selective_scan_fwd(u, u, A, B, B, None, z, None, True, None, None, False, 16, torch.float32)

        def scan(dy=u, kept=kept, every=16, dB=B.clone(), dz=z.clone()):
            ops.selective_scan_bwd_into(dy, None, u, u, A, B, B, None, z, None, True, None, None, False, None, kept, every, dB, B.clone(), dz)

        x, weight, rows = torch.ones(5, 2, 8), torch.ones(8, 4), torch.ones(5, 2, 3)

        def conv(dy=x, rows=None, columns=None, dx=x.clone()):
            ops.causal_conv1d_bwd_into(dy, None, x, weight, None, True, None, None, rows, columns, dx)

        gru = [torch.ones(5, 2, 3), torch.ones(24, 3), torch.ones(24, 8)]
        y, _, gates = ops.gru_fwd(*gru, None, None, None, None, True)
        scan()
        conv(rows=rows, columns=torch.ones(3, 8))
        for error, call in (
                ("dz must be there where z is", lambda: scan(dz=None)),
                ("dz must be", lambda: scan(dz=z[:3])),
                ("dy must be", lambda: scan(dy=u[:7])),
                ("dB must be", lambda: scan(dB=B[:7])),
                ("checkpoints must be", lambda: scan(kept=kept[:0])),
                ("checkpoint_every must be", lambda: scan(every=0)),
                ("dy must be", lambda: conv(dy=x[:2])),
                ("dx must be", lambda: conv(dx=x[:2])),
                ("rows and columns", lambda: conv(rows=rows)),
                ("columns must be", lambda: conv(rows=rows, columns=torch.ones(3, 7))),
                ("dy must be", lambda: ops.rms_norm_bwd(x[:2], None, x, torch.ones(8), 1e-5)),
                ("weight must be", lambda: ops.rms_norm_bwd(x, None, x, torch.ones(7), 1e-5)),
                ("x_proj must be", lambda: ops.scan_inputs(x, weight, None, torch.ones(6, 7), torch.ones(8, 2), None, None)),
                ("columns must be", lambda: ops.thin_linear_bwd_into(x[0], x[0], torch.ones(8, 7), torch.ones(2, 8))),
                ("gates must be", lambda: ops.gru_bwd(y, None, *gru, None, None, y, gates[:0], True)),
                ("dy must be", lambda: ops.gru_bwd(y[:1], None, *gru, None, None, y, gates, True))):
            with self.assertRaisesRegex(RuntimeError, error):
                call()


class Promises(unittest.TestCase):
    def test_decay_has_no_gradient_of_what_a_reset_clears(self):
        delta = torch.full((40, 2, 1), 3.0)
        delta[:, 1] = 0.01
        delta[0, 0] = float("nan")
        delta.requires_grad_()
        A = torch.tensor([[1.0]], requires_grad=True)
        reset = torch.zeros(40, 2, dtype=torch.bool)
        reset[5, 0] = True
        decay = ops.selective_scan_decay(delta, A, None, True, reset)
        d_delta, dA = torch.autograd.grad(decay.sum(), (delta, A))
        self.assertEqual(decay[0].item(), 0)
        self.assertTrue((d_delta[:, 0] == 0).all() and (d_delta[:, 1] > 0).all())
        self.assertTrue(dA.isfinite().all())

    def test_segments_join_under_autocast(self):
        a = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in scan_arguments(T=32).items()}
        a["reset"] = None
        first, second = ({name: x[half] if name in ("u", "delta", "B", "C", "z") else x for name, x in a.items()}
                         for half in (slice(0, 16), slice(16, 32)))
        with torch.autocast("cpu", torch.bfloat16):
            whole = ops.selective_scan(**a)[1]
            entering = ops.selective_scan(**first)[1]
            alone = ops.selective_scan(**dict(second, initial_state=None))[1]
            decay = ops.selective_scan_decay(second["delta"], a["A"], a["delta_bias"], True, None)
        self.assertEqual(decay.dtype, torch.float32)
        torch.testing.assert_close(decay * entering + alone, whole, rtol=1e-5, atol=1e-6)

    def test_states_follow_autocast(self):
        scan = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in scan_arguments(T=32).items()}
        with torch.autocast("cpu", torch.bfloat16):
            y, last = ops.selective_scan(**scan)
            got = ops.selective_scan_states(every=16, **scan)
        self.assertEqual((got[0].dtype, got[2].dtype), (torch.bfloat16, torch.float32))
        self.assertTrue(torch.equal(got[0], y) and torch.equal(got[1], last))
        none = {name: x[:0] if name in ("u", "delta", "B", "C", "z", "reset") else x for name, x in scan.items()}
        with torch.autocast("cpu", torch.bfloat16):
            types = {ops.selective_scan_states(every=every, **none)[0].dtype for every in (3, 16)}
        self.assertEqual(types, {torch.bfloat16})

    def test_tangents_are_refused(self):
        x, w = torch.ones(2, 1, 3), torch.ones(3)
        for call in (lambda v: ops.rms_norm(v, w)[0], lambda v: ops.causal_conv1d(v, torch.ones(3, 2))[0]):
            with self.assertRaisesRegex(RuntimeError, "jvp is not implemented"), torch.autograd.forward_ad.dual_level():
                call(torch.autograd.forward_ad.make_dual(x, x))
            with self.assertRaisesRegex(RuntimeError, "torch::autograd::Function with functorch"):
                torch.func.jvp(call, (x,), (x,))

    def test_states_updated_in_place_must_not_overlap(self):
        update = {name: x.detach() for name, x in update_arguments(B=2).items()}
        memory = torch.zeros(200)
        update["ssm_state"], update["conv_state"] = memory[:64].view(2, 8, 4), memory[40:88].view(2, 3, 8)
        with self.assertRaisesRegex(RuntimeError, "must not overlap"):
            ops.mamba_update_(**update)

    def test_updates_compile_for_any_batch(self):
        update = {name: x.detach() for name, x in update_arguments(B=5).items()}
        compiled = torch.compile(lambda **a: ops.mamba_update(**a), backend="aot_eager", dynamic=True)
        for got, expected in zip(compiled(**update), ops.mamba_update(**update)):
            self.assertTrue(torch.equal(got, expected))

    def test_an_infinite_rate_grows_without_bound(self):
        one = torch.ones(1, 1, 1)
        for A, expected in ((float("inf"), float("inf")), (-float("inf"), 0)):
            _, last = ops.selective_scan(torch.zeros(1, 1, 1), one, torch.full((1, 1), A), one[None], one[None], None, None, None,
                                         False, one)
            self.assertEqual(last.item(), expected)

    def test_an_infinite_rate_times_no_time_decays_nothing(self):
        A = torch.tensor([[float("inf"), -float("inf"), -1]]).requires_grad_()
        zero, matrix = torch.zeros(2, 1, 1, requires_grad=True), torch.ones(2, 1, 1, 3)
        for T in (0, 2):
            decay = ops.selective_scan_decay(zero[:T], A)
            self.assertTrue(torch.equal(decay, torch.ones(1, 1, 3)))
            self.assertTrue(all(g.isfinite().all() for g in torch.autograd.grad(decay.sum(), (zero, A))))
        for dtype in (torch.float32, torch.float64):
            wide = [x.to(dtype) for x in (zero, zero, A, matrix, matrix)]
            state = torch.ones(1, 1, 3, dtype=dtype)
            for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
                on = [x.detach().to(device) for x in (*wide, state)]
                last = ops.selective_scan(*on[:5], None, None, None, False, on[5])[1]
                self.assertTrue(torch.equal(last.cpu(), state))


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class OnCuda(OpTest):
    """The same ops on a GPU."""

    def test_scan_is_plain_scan(self):
        arguments = to_device(scan_arguments(T=300), "cuda")
        self.same(ops.selective_scan, plain_scan, arguments)
        self.check(ops.selective_scan, arguments)

    def test_compiled_scan_equals_eager(self):
        for T, dynamic in ((19, False), (33, True)):
            self.compiled_scan_equals_eager(to_device(scan_arguments(T=T), "cuda"), dynamic)
            narrow = to_device(scan_arguments(T=T, N=16), "cuda")  # its backward takes y
            for name in ("u", "delta", "B", "C", "z"):
                narrow[name] = narrow[name].detach().to(torch.bfloat16).requires_grad_()
            self.compiled_scan_equals_eager(narrow, dynamic)

    def test_a_graph_holds_training(self):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for T in (19, 2000):  # whole, and in segments
                with self.subTest(dtype=dtype, T=T):
                    arguments = to_device(scan_arguments(T=T, D=32, N=16), "cuda")
                    for name, x in arguments.items():
                        if isinstance(x, torch.Tensor) and x.is_floating_point():
                            arguments[name] = x.detach().to(dtype).requires_grad_()
                    step = training_step(arguments)
                    graph, captured = capture(step)
                    with torch.no_grad():
                        for x in arguments.values():
                            if isinstance(x, torch.Tensor) and x.is_floating_point():
                                x.mul_(1.25)
                    graph.replay()
                    for a, b in zip(captured, step()):
                        self.assertTrue(b.isfinite().all())
                        self.assertTrue(torch.equal(a, b))

    def test_a_graph_holds_acting(self):
        a = {k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in to_device(scan_arguments(), "cuda").items()}
        state, inputs = a["initial_state"].clone(), {k: a[k][0].clone() for k in ("u", "delta", "B", "C", "z", "reset")}

        def step():
            y, next_state = ops.selective_scan_update(inputs["u"], inputs["delta"], a["A"], inputs["B"], inputs["C"], state, a["D"],
                                                      inputs["z"], a["delta_bias"], True, inputs["reset"])
            state.copy_(next_state)
            return y

        graph, y = capture(step)
        state.copy_(a["initial_state"])
        expected, last_state = ops.selective_scan(**a)
        for t in range(expected.shape[0]):
            for name, x in inputs.items():
                x.copy_(a[name][t])
            graph.replay()
            self.assertTrue(torch.equal(y, expected[t]))
        self.assertTrue(torch.equal(state, last_state))

    def test_a_graph_holds_a_blocks_acting_step(self):
        a = {k: x.detach() for k, x in to_device(update_arguments(), "cuda").items()}
        conv, ssm, xz = a["conv_state"].clone(), a["ssm_state"].clone(), a["xz"].clone()
        graph, y = capture(lambda: ops.mamba_update_(**dict(a, xz=xz, conv_state=conv, ssm_state=ssm)))
        expected = ops.mamba_update(**a)
        conv.copy_(a["conv_state"]), ssm.copy_(a["ssm_state"])
        for _ in range(3):
            graph.replay()
            for got, wanted in zip((y, conv, ssm), expected):
                self.assertTrue(torch.equal(got, wanted))
            xz.mul_(0.9)
            expected = ops.mamba_update(**dict(a, xz=xz, conv_state=expected[1], ssm_state=expected[2]))

    def test_mamba_update(self):
        arguments = to_device(update_arguments(), "cuda")
        self.check(ops.mamba_update, arguments)
        self.check(ops.mamba_update_, {k: x.detach() for k, x in arguments.items()})

    def test_two_streams_do_not_disturb_each_other(self):
        steps = []
        for scale in (1, 2):  # what one stream left in another's scratch memory would show
            arguments = to_device(scan_arguments(T=2000, D=32), "cuda")
            arguments["u"] = (scale * arguments["u"]).detach().requires_grad_()
            steps.append(training_step(arguments))
        expected = [step() for step in steps]
        self.assertFalse(torch.equal(expected[0][0], expected[1][0]))
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in steps], []
        for _ in range(3):
            for step, stream, right in zip(steps, streams, expected):
                with torch.cuda.stream(stream):
                    results.append((step(), right))
        torch.cuda.synchronize()
        for result, right in results:
            for a, b in zip(result, right):
                self.assertTrue(torch.equal(a, b))


if __name__ == "__main__":
    unittest.main()
