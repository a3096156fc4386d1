#!/usr/bin/env python3
"""The batch job: `longfill prefill` and `longfill inspect` against golden data, and what they refuse."""

import ctypes
import json
import os
import signal
import struct
import subprocess
import time
import unittest

import google_crc32c
import numpy
import support
from support import GOLDEN, LONGFILL, run, some_tokens, write_model, write_tokens

import longfill
from longfill import safetensors_io


def golden(case):
    return {name: array for name, (_, array) in safetensors_io.read(GOLDEN / case / "golden.safetensors").items()}


class Golden(support.TemporaryDirectoryTest):
    """fp32 KV and logits within 1e-3 of their largest value (observed: 1e-5), on one rank and on several."""

    CASES = ["llama-gqa4", "llama-sharded-v5", "llama-rope-yarn-mscale", "llama-all-biases-fp32", "chatglm-remote-code",
             "phi3-longrope-long-factors", "qwen3-tied"]

    def check(self, case, **options):
        expected = golden(case)
        positions = ",".join(str(p) for p in expected["positions"])
        out = self.tmp / "out"
        arguments = ["prefill", "--model", GOLDEN / case, "--tokens", GOLDEN / case / "tokens.i32", "--out", out,
                     "--attention", "dense", "--logits", positions, "--json", "--overwrite"]
        ranks = options.get("ranks")
        if ranks:
            arguments += ["--mesh", options["mesh"]]
        result = run(*arguments, ranks=ranks)
        self.assertEqual(result.returncode, 0, result.stderr)
        figures = json.loads(result.stdout)
        self.assertEqual(figures["ranks"], ranks or 1)
        self.assertEqual(figures["density"], 1.0)
        self.assertEqual(sum(figures["rank_covered_pairs"]), figures["covered_pairs"])
        got = longfill.load_manifest(out)
        self.assertEqual(got.positions.tolist(), expected["positions"].tolist())
        self.assert_close(got.logits, expected["logits"], "logits")
        for layer, (key, value) in enumerate(got.to_numpy()):
            self.assert_close(key, expected[f"layer.{layer}.key"], f"layer {layer} key")
            self.assert_close(value, expected[f"layer.{layer}.value"], f"layer {layer} value")
        self.assertEqual(figures["kv_bytes"], sum(k.nbytes + v.nbytes for k, v in got.kv))

    def assert_close(self, got, expected, what):
        self.assertEqual(got.shape, expected.shape, what)
        worst = numpy.unravel_index(numpy.abs(got - expected).argmax(), got.shape)
        self.assertLessEqual(abs(got[worst] - expected[worst]), 1e-3 * numpy.abs(expected).max(),
                             f"{what} at {worst}: {got[worst]} instead of {expected[worst]}")

    def test_one_rank_computes_what_transformers_computes(self):
        for case in self.CASES:
            with self.subTest(case):
                self.check(case)

    def test_a_window_is_what_transformers_computes_and_no_more(self):
        case, window, tokens = "mistral-window", 37, 201
        expected = golden(case)
        for attention in ("dense", "vertical-slash:50,150", "block-sparse:3"):
            with self.subTest(attention):
                out = self.tmp / "out"
                result = run("prefill", "--model", GOLDEN / case, "--tokens", GOLDEN / case / "tokens.i32", "--out", out,
                             "--attention", attention, "--json", "--overwrite")
                self.assertEqual(result.returncode, 0, result.stderr)
                figures = json.loads(result.stdout)
                self.assertEqual(figures["attention"], f"{attention}, windows of {window} in 2 layers")
                pairs = sum(min(row + 1, window) for row in range(tokens))
                self.assertEqual(figures["covered_pairs"], pairs * 4 * 2)  # query heads, layers
                for layer, (key, value) in enumerate(longfill.load_manifest(out).to_numpy()):
                    self.assert_close(key, expected[f"layer.{layer}.key"], f"layer {layer} key")
                    self.assert_close(value, expected[f"layer.{layer}.value"], f"layer {layer} value")

    def test_four_ranks_compute_what_transformers_computes(self):
        for mesh in ("sequence=4", "head=4", "sequence=2,head=2"):
            with self.subTest(mesh):
                self.check("llama-gqa4", ranks=4, mesh=mesh)


class Output(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.model = write_model(self.tmp / "model")
        self.tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(300))

    def prefill(self, *options, ranks=None, **more):
        return run("prefill", "--model", self.model, "--out", self.tmp / "out", *options, ranks=ranks, **more)

    def test_json_is_all_of_standard_output_and_has_every_figure(self):
        for ranks in (None, 2):
            result = self.prefill("--tokens", self.tokens, "--json", "--overwrite", ranks=ranks)
            self.assertEqual(result.returncode, 0, result.stderr)
            figures = json.loads(result.stdout)
            wanted = {"tokens", "ranks", "mesh", "seconds", "index_seconds", "attention_seconds", "linear_seconds",
                      "communication_seconds", "exposed_communication_seconds", "published_pairs", "covered_pairs", "computed_pairs", "density",
                      "rank_covered_pairs", "imbalance", "kv_bytes", "peak_memory_bytes", "gemm_seconds",
                      "other_seconds", "exposed_copy_seconds", "peak_device_bytes", "planned_device_bytes",
                      "outside_device_bytes", "device", "communicator", "compute_dtype"}
            self.assertLessEqual(wanted, figures.keys())
            self.assertEqual(figures["tokens"], 300)
            self.assertEqual(len(figures["rank_covered_pairs"]), ranks or 1)
            self.assertGreater(figures["peak_memory_bytes"], 1 << 20)
            self.assertEqual(figures["compute_dtype"], "float32")
            self.assertEqual(figures["communicator"], "mpi" if ranks else "single")
            self.assertTrue(0.97 * figures["planned_device_bytes"] <= figures["peak_device_bytes"]
                            <= figures["planned_device_bytes"], figures)
            self.assertEqual(longfill.load_manifest(self.tmp / "out").manifest.dtype, "float32")

    def test_every_form_of_tokens_gives_the_same_result(self):
        ids = some_tokens(300)
        (self.tmp / "prompt.json").write_text(json.dumps(ids))
        results = []
        for source, text in ((self.tokens, None), (self.tmp / "prompt.json", None), ("-", json.dumps(ids))):
            result = self.prefill("--tokens", source, "--overwrite", **({"input": text} if text else {}))
            self.assertEqual(result.returncode, 0, result.stderr)
            results.append(longfill.load_manifest(self.tmp / "out"))
        for other in results[1:]:
            numpy.testing.assert_array_equal(other.logits, results[0].logits)
            self.assertEqual(other.manifest.token_hashes, results[0].manifest.token_hashes)

    def test_several_prompts_go_to_numbered_folders(self):
        short = write_tokens(self.tmp / "short.i32", some_tokens(3))
        for ranks in (None, 4):
            result = self.prefill("--tokens", self.tokens, "--tokens", short, "--json", "--overwrite", ranks=ranks)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual([p["tokens"] for p in json.loads(result.stdout)["prompts"]], [300, 3])
            self.assertEqual(longfill.load_manifest(self.tmp / "out" / "000").manifest.num_tokens, 300)
            self.assertEqual(longfill.load_manifest(self.tmp / "out" / "001").manifest.num_tokens, 3)
            self.assertEqual(sorted(p.name for p in (self.tmp / "out").iterdir()), ["000", "001"])

    def test_a_manifest_names_every_file_and_each_token_once(self):
        result = self.prefill("--tokens", self.tokens, "--mesh", "sequence=2,head=2", ranks=4)
        self.assertEqual(result.returncode, 0, result.stderr)
        prefilled = longfill.load_manifest(self.tmp / "out")  # checks that every (layer, head, token) is there once
        files = {f.name for f in prefilled.manifest.files} | {"manifest.json", "logits.safetensors"}
        self.assertEqual(set(support.files_below(self.tmp / "out")), files)

    def test_half_precision_caches_are_the_rounded_float32_cache(self):
        caches = {}
        for dtype in ("float32", "bfloat16", "float16"):
            result = self.prefill("--tokens", self.tokens, "--kv-dtype", dtype, "--overwrite")
            self.assertEqual(result.returncode, 0, result.stderr)
            caches[dtype] = longfill.load_manifest(self.tmp / "out").to_numpy()
        for dtype, relative in (("bfloat16", 2**-8), ("float16", 2**-11)):
            for (key, value), (key32, value32) in zip(caches[dtype], caches["float32"]):
                numpy.testing.assert_allclose(key, key32, rtol=relative, atol=1e-6)
                numpy.testing.assert_allclose(value, value32, rtol=relative, atol=1e-6)

    def test_discarded_caches_have_the_checksum_of_the_files(self):
        result = self.prefill("--tokens", self.tokens)
        self.assertEqual(result.returncode, 0, result.stderr)
        checksum = 0
        for key, value in longfill.load_manifest(self.tmp / "out").to_numpy():
            for array in (key, value):
                for head in array:
                    crc = google_crc32c.value(head.tobytes())
                    checksum = google_crc32c.extend(checksum, struct.pack("<I", crc))
        for options, ranks in (([], None), (["--out", self.tmp / "logits"], None), (["--mesh", "sequence=2"], 2)):
            result = run("prefill", "--model", self.model, "--tokens", self.tokens, "--kv", "discard", "--json", *options,
                         ranks=ranks)
            self.assertEqual(result.returncode, 0, result.stderr)
            checksums = json.loads(result.stdout)["rank_kv_crc32c"]
            self.assertEqual(len(checksums), ranks or 1)
            if ranks is None:
                self.assertEqual(checksums, [f"{checksum:08x}"])
        self.assertEqual(support.files_below(self.tmp / "logits"), ["logits.safetensors"])

    def test_overwrite_touches_no_file_of_others(self):
        out = self.tmp / "out"
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        result = self.prefill("--tokens", self.tokens)
        self.assertEqual(result.returncode, 2)
        self.assertIn("--overwrite", result.stderr)
        self.assertEqual(support.files_below(out), ["notes.txt"])
        result = self.prefill("--tokens", self.tokens, "--overwrite")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual((out / "notes.txt").read_text(), "mine")

    def test_sparse_patterns_report_their_density(self):
        tokens = write_tokens(self.tmp / "long.i32", some_tokens(3000))
        for spec in ("a-shape:64,128", "vertical-slash:30,50", "block-sparse:4"):
            for coverage in ("tiles", "parity"):
                result = self.prefill("--tokens", tokens, "--attention", spec, "--coverage", coverage, "--json", "--overwrite")
                self.assertEqual(result.returncode, 0, result.stderr)
                figures = json.loads(result.stdout)
                self.assertLess(figures["density"], 0.5, spec)
                self.assertLessEqual(figures["covered_pairs"], figures["computed_pairs"], spec)

    def test_recall_is_reported_when_it_is_watched_and_held_when_it_is_guarded(self):
        tokens = write_tokens(self.tmp / "long.i32", some_tokens(3000))
        results = {}
        for ranks in (None, 2):
            for name, options in (("off", []), ("watched", ["--recall-monitor"]), ("guarded", ["--min-recall", "1"])):
                result = self.prefill("--tokens", tokens, "--attention", "vertical-slash:30,50", "--json", "--overwrite",
                                      *options, ranks=ranks)
                self.assertEqual(result.returncode, 0, result.stderr)
                results[name] = json.loads(result.stdout)
            self.assertNotIn("recall", results["off"])
            watched, guarded = results["watched"]["recall"], results["guarded"]["recall"]
            self.assertEqual(watched["recomputed"], 0)
            self.assertLess(watched["min"], 1)
            self.assertGreater(watched["min"], 0)
            self.assertEqual(len(watched["layers"]), 2)
            layer = watched["layers"][watched["min_layer"]]
            self.assertEqual(layer["min"], watched["min"])
            self.assertEqual(layer["min_head"], watched["min_head"])
            self.assertEqual(layer["heads"][watched["min_head"]], watched["min"])
            self.assertAlmostEqual(watched["mean"], sum(each["mean"] for each in watched["layers"]) / 2)
            self.assertEqual(guarded["min"], 1)
            self.assertEqual(guarded["min_recall"], 1)
            self.assertEqual(guarded["recomputed"], sum(len(each["recomputed"]) for each in guarded["layers"]))
            self.assertGreater(guarded["recomputed"], 0)
            for each in guarded["layers"][0]["recomputed"]:
                self.assertEqual((each["pattern"], each["recall"], each["density"]), ("dense", 1, 1))
                self.assertAlmostEqual(each["recall_before"], watched["layers"][0]["heads"][each["head"]], places=4)
        result = self.prefill("--tokens", tokens, "--attention", "vertical-slash:30,50", "--recall-monitor", "--overwrite")
        self.assertRegex(result.stdout, r"recall 0\.\d+, least 0\.\d+ \(layer \d, head \d\), 0 heads computed again")

    def test_inspect_shows_model_and_plan(self):
        result = run("inspect", "--model", self.model, "--tokens", "300", "--mesh", "sequence=2")
        self.assertEqual(result.returncode, 0, result.stderr)
        for text in ("LlamaForCausalLM", "300 tokens", "sequence=2,head=1", "total", "longest prompt"):
            self.assertIn(text, result.stdout)
        result = run("inspect", "--model", self.model, "--memory-limit", "1")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("longest prompt: 0 tokens for prefill, 0 for serve", result.stdout)
        for option, value in (("--memory-limit", "-5"), ("--memory-limit", "0"), ("--memory-limit", "9e30GB"), ("--tokens", "-3"),
                              ("--tokens", "1.5"), ("--dense-below", "-1")):
            result = run("inspect", "--model", self.model, option, value)
            self.assertEqual(result.returncode, 2, result.stdout)
            self.assertIn(f'{option}: "{value}" is', result.stderr)
        with open("/dev/full", "w", encoding="utf-8") as full:
            result = subprocess.run([LONGFILL, "inspect", "--model", self.model], stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertEqual((result.returncode, "standard output" in result.stderr), (1, True))


class Inspect(support.TemporaryDirectoryTest):
    def inspect(self, model, *options):
        result = run("inspect", "--model", model, *options)
        self.assertEqual(result.returncode, 0, result.stderr)
        return dict(line.split(maxsplit=1) for line in result.stdout.replace("rotary embedding", "rotary_embedding")
                    .replace("pattern file", "pattern_file").splitlines() if len(line.split(maxsplit=1)) == 2)

    def test_a_model_is_described_by_family_rope_and_what_is_unusual(self):
        cases = {
            "llama-gqa4": ("llama", "theta 10000, scaling none", "nothing"),
            "llama-rope-llama3": ("llama", "theta 500000, scaling llama3 x8 of 64", "nothing"),
            "llama-all-biases-fp32": ("llama", "theta 10000, scaling none", "biases of Q, K, V and O, biases of the MLP"),
            "qwen2-window-by-layer-types-v5": (
                "qwen2", "theta 10000, scaling none", "biases of Q, K and V, sliding window of 33 in 2 of 3 layers"),
            "qwen2-first-of-dual-chunks": (
                "qwen2", "theta 10000, scaling none",
                "biases of Q, K and V, dual chunk attention beyond 128 tokens, distances up to 160, "
                "scaled beyond 160 tokens"),
            "qwen2-yarn-beyond-original": (
                "qwen2", "theta 10000, scaling yarn x4 of 64, cos and sin times 1.139", "biases of Q, K and V"),
            "phi3-su-window": (
                "phi3", "theta 10000, scaling longrope x8, short factors up to 64 tokens, long ones beyond, "
                "cos and sin times 1.225", "sliding window of 66 in 2 of 2 layers"),
            "qwen3-tied": ("qwen3", "theta 10000, scaling none", "norms of query and key heads"),
            "chatglm-remote-code": (
                "chatglm", "theta 5e+06, first 32 of 64 dims, interleaved pairs, scaling none", "biases of Q, K and V"),
        }
        for case, (family, rope, unusual) in cases.items():
            with self.subTest(case):
                shown = self.inspect(GOLDEN / case)
                self.assertEqual(shown["family"], family)
                self.assertEqual(shown["rotary_embedding"], rope)
                self.assertEqual(shown["unusual"], unusual)

    def test_patterns_are_found_in_a_directory_by_the_name_of_the_model(self):
        model = write_model(self.tmp / "Phi-3-mini-128k-instruct")
        directory = self.tmp / "configs"
        directory.mkdir()
        options = ["--tokens", "300", "--dense-below", "0", "--patterns", directory]
        result = run("inspect", "--model", model, *options)
        self.assertEqual(result.returncode, 2, result.stderr)
        for word in ("--patterns", "Phi-3-mini-128k-instruct", "patterns.json"):
            self.assertIn(word, result.stderr)
        published = directory / "Phi_3_mini_128k_instruct_kv_out_v32_fit_o_best_pattern.json"
        published.write_text(json.dumps([{"0": ["stream_llm", 1, 64, 0.5]}] * 2), encoding="utf-8")
        shown = self.inspect(model, *options)
        self.assertEqual(shown["patterns"], str(published))
        self.assertEqual(shown["pattern_file"], "published form, without provenance")

        own = directory / "Phi-3-mini-128k-instruct.json"
        def write_own(fingerprint):
            patterns = [{"0": ["vertical_and_slash", 1000, 6096, 0.75]}, {"1": ["stream_llm", 1, 64, 0.5]}]
            patterns.append({"longfill": {
                "version": 1, "model": {"name": "base", "fingerprint": fingerprint}, "calibration": {"sha256": "0" * 64},
                "search": {"budgets": [1, 2]}, "score": "recall", "exact": {"0": {"0": "dense"}}}})
            own.write_text(json.dumps(patterns), encoding="utf-8")
        write_own("0" * 64)
        shown = self.inspect(model, *options)
        self.assertEqual(shown["patterns"], str(own))
        self.assertEqual(shown["pattern_file"],
                         f"searched for another model, base, fingerprint {'0' * 64}, recall 0.500 to 0.750")
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(300))
        prefill = ["prefill", "--model", model, "--tokens", tokens, "--out", self.tmp / "out", "--json", "--overwrite",
                   *options[2:]]
        self.assertEqual(json.loads(run(*prefill).stdout)["attention"], f"{own} (auto), searched for another model")
        write_own(shown["fingerprint"])
        shown = self.inspect(model, *options)
        self.assertEqual(shown["pattern_file"], "searched for this model, recall 0.500 to 0.750")
        self.assertEqual(json.loads(run(*prefill).stdout)["attention"], f"{own} (auto)")


class Cuda(support.TemporaryDirectoryTest):
    """The same prompts on a GPU in bfloat16: twice the largest error of transformers' own bfloat16 run."""

    def setUp(self):
        super().setUp()
        if not support.has_gpu():
            self.skipTest("there is no GPU, or longfill was built without CUDA")

    def test_a_gpu_computes_what_transformers_computes(self):
        for case, ranks in (("llama-gqa7-tied", None), ("llama-head-dim-128", None), ("llama-gqa7-tied", 2)):
            with self.subTest(f"{case} {ranks}"):
                expected = golden(case)
                positions = ",".join(str(p) for p in expected["positions"])
                out = self.tmp / f"{case}-{ranks}"
                result = run("prefill", "--model", GOLDEN / case, "--tokens", GOLDEN / case / "tokens.i32", "--out", out,
                             "--attention", "dense", "--logits", positions, "--device", "cuda", "--json", ranks=ranks)
                self.assertEqual(result.returncode, 0, result.stderr)
                figures = json.loads(result.stdout)
                self.assertEqual(figures["compute_dtype"], "bfloat16")
                self.assertIn("sm_", figures["device"])
                self.assertIn(figures["communicator"], ("staged mpi", "nccl") if ranks else ("staged single",))
                self.assertTrue(0.97 * figures["planned_device_bytes"] <= figures["peak_device_bytes"]
                                <= figures["planned_device_bytes"], figures)
                got = longfill.load_manifest(out)
                self.assertEqual(got.manifest.dtype, "bfloat16")
                self.assert_close(got.logits, expected["logits"], 0.041, "logits")
                for layer, (key, value) in enumerate(got.to_numpy()):
                    self.assert_close(key, expected[f"layer.{layer}.key"], 0.028, f"layer {layer} key")
                    self.assert_close(value, expected[f"layer.{layer}.value"], 0.028, f"layer {layer} value")

    def assert_close(self, got, expected, tolerance, what):
        self.assertLessEqual(numpy.abs(got.astype(numpy.float32) - expected).max(),
                             tolerance * numpy.abs(expected).max(), what)

    def test_inspect_shows_device_and_host(self):
        result = run("inspect", "--model", GOLDEN / "llama-gqa7-tied", "--device", "cuda")
        self.assertEqual(result.returncode, 0, result.stderr)
        for text in ("sm_", "device", "host", "page-locked", "driver and libraries", "KV bfloat16"):
            self.assertIn(text, result.stdout)

    def test_what_the_gpu_has_no_kernel_for_is_refused_by_name(self):
        result = run("prefill", "--model", GOLDEN / "llama-gqa4", "--tokens", GOLDEN / "llama-gqa4" / "tokens.i32",
                     "--out", self.tmp / "out", "--device", "cuda")
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn("head_dim 32", result.stderr)


class BadInput(support.TemporaryDirectoryTest):
    """Exit code 2, one line `longfill: ...` on standard error that names what is wrong, and nothing left behind."""

    def setUp(self):
        super().setUp()
        self.model = write_model(self.tmp / "model")
        self.tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(300))

    def refused(self, *words, model=None, tokens=None, options=(), ranks=None, command="prefill", code=2, **more):
        out = self.tmp / "out"
        arguments = [command, "--model", model or self.model]
        if command == "prefill":
            arguments += ["--tokens", tokens or self.tokens, "--out", out]
        result = run(*arguments, *options, ranks=ranks, **more)
        self.assertEqual(result.returncode, code, f"{result.stderr}\n{result.stdout}")
        self.assertEqual(result.stdout, "")
        ours = [line for line in result.stderr.splitlines() if line.startswith("longfill: ")]
        self.assertEqual(len(ours), 1, result.stderr)
        if ranks is None:
            self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        for word in words:
            self.assertIn(str(word), ours[0])
        self.assertFalse(out.exists(), "output was left behind")

    def file(self, name, content):
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def test_token_files(self):
        for name, content, *words in (
            ("a.i32", b"", "no token ids"),
            ("b.i32", b"\1\0\0\0\2", "5 bytes"),
            ("c.i32", struct.pack("<2i", 1, -4), "-4", "index 1"),
            ("d.i32", struct.pack("<2i", 1, 97), "97"),
            ("e.json", "[]", "no token ids"),
            ("f.json", "[1, 2.5]", "2.5", "element 1"),
            ("g.json", "[1, -2]", "-2", "index 1"),
            ("h.json", "hello", "h.json"),
            ("i.json", "[1, 3000000000]", "3000000000"),
        ):
            with self.subTest(name):
                self.refused(*words, tokens=self.file(name, content))
        self.refused("nowhere.i32", tokens=self.tmp / "nowhere.i32")

    def test_prompts_beyond_the_model_or_the_memory(self):
        self.refused("4097", "4096", tokens=write_tokens(self.tmp / "long.i32", some_tokens(4097)))
        with self.subTest("memory"):
            large = write_model(self.tmp / "large", max_position_embeddings=1 << 24)
            tokens = write_tokens(self.tmp / "large.i32", some_tokens(400000))
            self.refused("tokens", "fit", model=large, tokens=tokens, options=["--memory-limit", "20MB"])

    def test_prompts_beyond_the_first_of_dual_chunks(self):
        for pattern, count, refusal in (
            ("block-sparse:3", 128, None), ("block-sparse:3", 129, "block-sparse:3 is not supported with dual chunk"),
            ("block-share:3,0.1", 129, "block-share:3,0.1 is not supported with dual chunk"),
            ("vertical-slash:40,120", 129, None), ("a-shape:7,70", 300, None), ("dense", 300, None),
        ):
            with self.subTest(f"{pattern} {count}"):
                result = run("prefill", "--model", GOLDEN / "qwen2-first-of-dual-chunks", "--out", self.tmp / "out",
                             "--tokens", write_tokens(self.tmp / "chunk.i32", [1] * count), "--overwrite",
                             "--attention", pattern)
                self.assertEqual(result.returncode, 2 if refusal else 0, result.stderr)
                self.assertIn(refusal or "", result.stderr)
                if refusal is None:
                    manifest = json.loads((self.tmp / "out" / "manifest.json").read_text())
                    self.assertEqual(manifest["rotary_chunk_tokens"], 128)
        result = run("prefill", "--model", GOLDEN / "qwen2-first-of-dual-chunks", "--out", self.tmp / "out", "--tokens",
                     write_tokens(self.tmp / "chunk.i32", [1] * 129), "--overwrite", "--attention",
                     "vertical-slash:40,120", "--coverage", "parity")
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn("coverage parity is not supported with dual chunk attention", result.stderr)

    def test_options(self):
        for options, *words in (
            (["--attention", "a-shape:-1,5"], "-1"),
            (["--attention", "vertical-slash:10,-2"], "-2"),
            (["--attention", "block-sparse:0"], "0"),
            (["--attention", "triangle:3"], "triangle:3"),
            (["--logits", "300"], "300"),
            (["--logits", "5,-1"], "-1"),
            (["--mesh", "sequence=2"], "sequence=2", "mpirun"),
            (["--mesh", "rows=2"], "rows"),
            (["--device", "tpu"], "--device", "tpu"),
            (["--device", "cuda:one"], "--device", "cuda:one"),
            (["--device-dtype", "bfloat16"], "bfloat16", "float32"),
            (["--communicator", "nccl"], "--communicator nccl", "--device is cpu"),
            (["--communicator", "smoke"], "--communicator", "smoke"),
            (["--peer-copies", "on"], "--peer-copies on", "--device is cpu"),
            (["--peer-copies", "maybe"], "--peer-copies", "maybe"),
            (["--kv", "keep"], "--kv"),
            (["--kv-dtype", "int8"], "--kv-dtype"),
            (["--coverage", "all"], "--coverage"),
            (["--min-recall", "0"], "--min-recall", '"0"'),
            (["--min-recall", "1.01"], "--min-recall", "1.01"),
            (["--min-recall", "nan"], "--min-recall", "nan"),
            (["--min-recall", "most"], "--min-recall", "most"),
            (["--threads", "0"], "--threads"),
            (["--dense-below", "-5"], "--dense-below"),
            (["--patterns", "/no/such/file"], "/no/such/file"),
            (["--no-such-option"], "--no-such-option"),
        ):
            with self.subTest(options):
                self.refused(*words, options=options)

    def test_a_gpu_that_is_not_there(self):
        if support.has_gpu():
            self.skipTest("there is a GPU")
        for command in ("prefill", "inspect", "serve"):
            with self.subTest(command):
                self.refused("--device cuda", "CUDA", "--device cpu", command=command, options=["--device", "cuda"])
        self.refused("--device cuda:1", options=["--device", "cuda:1"], ranks=2)

    def test_an_output_directory_is_missed_unless_nothing_is_written(self):
        result = run("prefill", "--model", self.model, "--tokens", self.tokens)
        self.assertEqual(result.returncode, 2)
        self.assertIn("--out", result.stderr)

    def test_pattern_files(self):
        good = [{str(head): ["vertical_and_slash", 30, 100, 1.0] for head in range(4)} for _ in range(2)]
        cases = {
            "layers.json": (good[:1], "layer"),
            "heads.json": ([good[0] | {"4": ["stream_llm", 1, 2, 1.0]}, good[1]], "4"),
            "type.json": ([good[0] | {"1": ["circle", 1, 2, 1.0]}, good[1]], "circle"),
            "budget.json": ([good[0] | {"1": ["vertical_and_slash", -1, 2, 1.0]}, good[1]], "-1"),
            "form.json": ({"a": 1}, "form.json"),
        }
        for name, (patterns, word) in cases.items():
            with self.subTest(name):
                self.refused(word, options=["--attention", self.file(name, json.dumps(patterns))])

    def test_output_directories(self):
        file = self.file("plain", "x")
        for out, word in ((file, "not a directory"), (file / "below", "plain"), ("/proc/longfill", "/proc/longfill")):
            with self.subTest(out):
                result = run("prefill", "--model", self.model, "--tokens", self.tokens, "--out", out)
                self.assertEqual(result.returncode, 2, result.stderr)
                self.assertIn(word, result.stderr)

    def test_errors_under_mpirun_are_printed_once(self):
        self.refused("97", tokens=write_tokens(self.tmp / "id.i32", [1, 97]), ranks=3)
        self.refused("nowhere.i32", tokens=self.tmp / "nowhere.i32", ranks=3)
        self.refused("sequence=2", "3", options=["--mesh", "sequence=2"], ranks=3)
        self.refused("--no-such-option", options=["--no-such-option"], ranks=3)
        self.refused("config.json", model=self.tmp, ranks=3)

    def test_usage_without_a_subcommand(self):
        result = run()
        self.assertEqual(result.returncode, 2)
        self.assertTrue(result.stderr.startswith("longfill: "))


class BadModel(BadInput):
    """Checkpoints that are refused, by `prefill` and by `inspect`."""

    # The cases of the base class run there.
    test_prompts_beyond_the_first_of_dual_chunks = None
    test_token_files = test_prompts_beyond_the_model_or_the_memory = test_options = test_pattern_files = None
    test_output_directories = test_errors_under_mpirun_are_printed_once = test_usage_without_a_subcommand = None
    test_a_gpu_that_is_not_there = test_an_output_directory_is_missed_unless_nothing_is_written = None

    def refused_model(self, model, *words):
        for command in ("prefill", "inspect"):
            with self.subTest(f"{model.name} {command}"):
                self.refused(*words, model=model, command=command)

    def with_tensors(self, name, change):
        """A model whose tensors went through `change`."""
        model = write_model(self.tmp / name)
        path = model / "model.safetensors"
        tensors = {n: (kind, numpy.array(array)) for n, (kind, array) in safetensors_io.read(path).items()}
        change(tensors)
        safetensors_io.write(path, tensors)
        return model

    def with_bytes(self, name, change):
        model = write_model(self.tmp / name)
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return model

    def test_configs(self):
        for name, changes, *words in (
            ("unknown-architecture", dict(architectures=["MambaForCausalLM"], model_type="mamba"), "Mamba"),
            ("unknown-scaling", dict(rope_scaling={"rope_type": "spiral", "factor": 2.0}), "spiral"),
            ("unknown-activation", dict(hidden_act="relu6"), "relu6"),
            ("negative-layers", dict(num_hidden_layers=-1), "num_hidden_layers"),
            ("uneven-groups", dict(num_attention_heads=4, num_key_value_heads=3), "num_key_value_heads"),
        ):
            model = write_model(self.tmp / name)
            config = json.loads((model / "config.json").read_text()) | changes
            (model / "config.json").write_text(json.dumps(config))
            self.refused_model(model, *words)
        broken = write_model(self.tmp / "broken-json")
        (broken / "config.json").write_text("{")
        self.refused_model(broken, "config.json")

    def test_tensors(self):
        query = "model.layers.1.self_attn.q_proj.weight"
        self.refused_model(self.with_tensors("missing", lambda t: t.pop(query)), query)
        self.refused_model(self.with_tensors("misshapen", lambda t: t.update({query: ("F32", t[query][1][1:])})), query)

    def test_truncated_and_hostile_files(self):
        def header(text, length=None):
            data = text.encode()
            return lambda _: struct.pack("<Q", len(data) if length is None else length) + data

        duplicate = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        huge = '{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
        for name, change in {
            "truncated": lambda data: data[:-100],
            "empty": lambda data: b"",
            "short": lambda data: b"\1\2\3",
            "long-header": header("{}", 2**63),
            "header-beyond-the-file": header("{}", 1 << 20),
            "header-no-json": header("{{{{"),
            "duplicate": header(duplicate),
            "overflowing-shape": header(huge),
            "deep": header("[" * 100000),
        }.items():
            self.refused_model(self.with_bytes(name, change), "model.safetensors")

    def test_folders_without_a_model(self):
        self.refused_model(self.tmp / "nothing", "nothing")
        model = write_model(self.tmp / "no-weights")
        (model / "model.safetensors").unlink()
        self.refused_model(model, "safetensors")


class Interrupted(support.TemporaryDirectoryTest):
    def test_an_interrupted_job_leaves_nothing(self):
        model = write_model(self.tmp / "model", num_hidden_layers=8, max_position_embeddings=1 << 17)
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(100000))
        out = self.tmp / "out"
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            job = subprocess.Popen([support.LONGFILL, "prefill", "--model", model, "--tokens", tokens, "--out", out,
                                    "--attention", "dense"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            deadline = time.monotonic() + 30
            while not list(out.glob("kv-layer-*")) and time.monotonic() < deadline and job.poll() is None:
                time.sleep(0.05)
            job.send_signal(signal_number)
            _, stderr = job.communicate(timeout=30)
            self.assertEqual(job.returncode, 1, stderr)
            self.assertIn(signal.Signals(signal_number).name, stderr.splitlines()[-1])
            self.assertFalse(out.exists())


class FullDisk(support.TemporaryDirectoryTest):
    def test_a_full_disk_is_named_and_left_clean(self):
        out = self.tmp / "disk"
        out.mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"none", str(out).encode(), b"tmpfs", 0, b"size=256k") != 0:
            self.skipTest(f"cannot mount a small file system here: {os.strerror(ctypes.get_errno())}")
        self.addCleanup(lambda: libc.umount(str(out).encode()))
        model = write_model(self.tmp / "model")
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(3000))  # KV: 3000 x 512 bytes
        for ranks in (None, 2):
            result = run("prefill", "--model", model, "--tokens", tokens, "--out", out, "--attention", "a-shape:1,64", ranks=ranks)
            self.assertEqual(result.returncode, 1, result.stderr)
            ours = [line for line in result.stderr.splitlines() if line.startswith("longfill: ")]
            self.assertEqual(len(ours), 1, result.stderr)
            self.assertIn("space", ours[0])
            self.assertEqual(support.files_below(out), [])


class Program(unittest.TestCase):
    def test_version_names_the_commit(self):
        result = run("--version")
        self.assertEqual(result.returncode, 0)
        git = subprocess.run(["git", "-C", support.ROOT, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        self.assertIn(git.stdout.strip() or "unknown", result.stdout)

    def test_help_lists_every_option(self):
        wanted = {
            "inspect": ["--model", "--tokens", "--mesh", "--device", "--memory-limit"],
            "prefill": ["--model", "--tokens", "--out", "--attention", "--mesh", "--device", "--coverage", "--logits",
                        "--kv-dtype", "--dense-below", "--patterns", "--overwrite", "--json", "--threads"],
            "serve": ["--model", "--listen", "--kv-listen", "--mesh", "--attention"],
            "submit": ["--target", "--tokens", "--out", "--attention", "--logits", "--coverage", "--kv-dtype"],
            "bench prefill": ["--geometry", "--tokens", "--attention", "--indices", "--kv", "--repeat", "--device"],
            "bench attention": ["--tokens", "--attention", "--indices", "--patterns", "--kernels", "--reference-tflops", "--device"],
            "bench index": ["--tokens", "--budget", "--q-heads", "--kv-heads", "--kernels", "--device"],
        }
        for command, options in wanted.items():
            result = run(*command.split(), "--help")
            self.assertEqual(result.returncode, 0, result.stderr)
            for option in options:
                self.assertIn(option, result.stdout, command)
        self.assertIn("inspect", run("--help").stdout)


if __name__ == "__main__":
    support.main()
