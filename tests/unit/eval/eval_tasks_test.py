#!/usr/bin/env python3
"""Key-value retrieval, perplexity, files of InfiniteBench and RULER."""

import json
import re
import unittest

import eval_support
import numpy

from longfill.eval.errors import UsageError
from longfill.eval.tokens import TextTokenizer


class KeyValue(eval_support.TokenizerTest):
    def test_the_value_is_that_of_the_key_in_a_whole_json_object(self):
        for model in self.models:
            tokenizer = TextTokenizer(model)
            for i, sample in enumerate(self.samples("kv-retrieval", model, lengths=(6000,), samples=4)):
                text = tokenizer.decode(sample.ids.tolist())
                pairs = json.loads(re.search(r"\{.*\}", text)[0])
                key = re.search(r'value of the key "(\S+)" is "', text)[1]
                answer = tokenizer.decode(list(sample.questions[0].answer))
                self.assertEqual(pairs[key], answer)
                self.assertEqual(text.count(answer), 1)  # the prompt's end lacks its last token
                self.assertAlmostEqual(list(pairs).index(key) / len(pairs), (i + 0.5) / 4, delta=0.1)
                pair_tokens = len(tokenizer.encode(f'"{key}": "{answer}", '))
                self.assertTrue(6000 - 1.5 * pair_tokens < len(sample.ids) <= 6000, len(sample.ids))

    def test_a_length_without_room_is_named(self):
        with self.assertRaisesRegex(UsageError, "--length 50: kv-retrieval needs"):
            self.samples("kv-retrieval", self.models[0], lengths=(50,))


class Perplexity(eval_support.TokenizerTest):
    def test_windows_end_where_slices_end_and_ask_for_the_text_itself(self):
        path = self.tmp / "book.txt"
        path.write_text(" ".join(f"Sentence {i} of a book." for i in range(2000)))
        sample, = self.samples("perplexity", self.models[1], lengths=(3001,), text=path, windows=5, window=7)
        self.assertEqual((len(sample.ids), len(sample.questions)), (3001, 5))
        for i, question in enumerate(sample.questions):
            end = (i + 1) * 3001 // 5
            self.assertEqual(question.positions, range(end - 8, end - 1))
            self.assertEqual(sample.ids[end - 7 : end].tolist(), list(question.answer))
        tokenizer = TextTokenizer(self.models[1])
        self.assertIn(tokenizer.decode(sample.ids[1:].tolist()), 2 * path.read_text())

    def test_what_cannot_be_is_refused(self):
        path = self.tmp / "short.txt"
        path.write_text("Not much. ")
        for word, settings in (("needs --text", {}), ("--text has", dict(text=path)),
                               ("room for 100 positions", dict(text=path, windows=101, window=1))):
            with self.assertRaisesRegex(UsageError, word):
                self.samples("perplexity", self.models[0], max_positions=100 if "windows" in settings else 10000, **settings)


class Files(eval_support.TokenizerTest):
    def write(self, name, records):
        path = self.tmp / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def test_infinitebench_contexts_lose_their_middle(self):
        records = [{"id": i, "context": f"BEGIN{i} " + 3000 * "x" + f" END{i}", "input": f"What is {i}?", "answer": [f"it is {i}", "no"]}
                   for i in range(5)]
        path = self.write("longbook_qa_eng.jsonl", records)
        model = self.models[0]
        made = self.samples(f"infinitebench:{path}", model, lengths=(500, 5000), samples=3)
        self.assertEqual([s.length for s in made], [500] * 3 + [5000] * 3)
        # The same questions at every length.
        self.assertEqual([s.name.split("/")[1] for s in made[:3]], [s.name.split("/")[1] for s in made[3:]])
        for sample in made:
            self.assertEqual(sample.task, "infinitebench:longbook_qa_eng")
            prompt, answers = eval_support.prompt_text(sample, TextTokenizer(model))
            i = re.match(r"BEGIN(\d)", prompt)[1]
            self.assertTrue(prompt.rstrip().endswith(f"END{i}\n\nWhat is {i}?\nAnswer:"), prompt[-80:])
            self.assertEqual(answers[0].strip(), f"it is {i}")
            if sample.length == 500:
                self.assertEqual(len(sample.ids), 500)
            else:
                self.assertIn(3000 * "x", prompt)

    def test_ruler_files_keep_their_prompts(self):
        records = [{"index": i, "input": 50 * i * "y" + "Question:", "outputs": ["a1", "b2"], "answer_prefix": " They are"}
                   for i in range(1, 4)]
        for name, answers in (("niah_multivalue/validation.jsonl", ["a1", "b2"]), ("qa_1/validation.jsonl", ["a1"])):
            path = self.write(name, records)
            made = self.samples(f"ruler-file:{path}", self.models[0], lengths=(150,), samples=9)
            self.assertEqual([s.task for s in made], 2 * [f"ruler-file:{path.parent.name}"])  # the third is too long
            for sample in made:
                prompt, got = eval_support.prompt_text(sample, TextTokenizer(self.models[0]))
                self.assertEqual([a.strip() for a in got], answers)
                self.assertIn(prompt.rstrip(), [r["input"] + r["answer_prefix"] for r in records])
            with self.assertRaisesRegex(UsageError, "all 3 samples are longer"):
                self.samples(f"ruler-file:{path}", self.models[0], lengths=(20,))

    def test_broken_files_are_named(self):
        path = self.write("broken.jsonl", [{"context": "c", "input": "i", "answer": "a"}, {"context": "c"}])
        for task, word in ((f"infinitebench:{path}", "line 2"), (f"ruler-file:{path}", "line 1"),
                           (f"infinitebench:{self.tmp}/absent.jsonl", "No such file")):
            with self.assertRaisesRegex(UsageError, word):
                self.samples(task, self.models[0])

    def test_samples_of_several_lengths_are_one_plan_short_ones_first(self):
        made = self.samples("niah-end", self.models[1], lengths=(4000, 2000, 4000), depths=2)
        self.assertEqual([len(s.ids) for s in made], [2000, 2000, 4000, 4000])
        self.assertEqual(len({s.name for s in made}), 4)
        self.assertTrue(all(s.ids.dtype == numpy.int32 for s in made))


if __name__ == "__main__":
    unittest.main()
