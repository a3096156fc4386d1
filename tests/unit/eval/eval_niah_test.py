#!/usr/bin/env python3
"""Haystacks and needles: what is asked is in the text once, where it should be, in exactly the tokens asked for."""

import random
import re
import unittest

import eval_support
import numpy

from longfill.eval import filler, niah
from longfill.eval.errors import UsageError
from longfill.eval.tokens import TextTokenizer

STATEMENT = re.compile(r"The special magic number for (\w+ \w+) is: (\d{6})\.")
QUESTION = re.compile(r"What is the special magic number for (\w+ \w+)\? The number is: (\d{6})?")


class Tokenizers(eval_support.TokenizerTest):
    def test_what_a_tokenizer_puts_first_is_known_and_not_part_of_pieces(self):
        plain, words = map(TextTokenizer, self.models)
        self.assertEqual((plain.prefix, words.prefix), ([], [0]))
        self.assertEqual(words.encode(" apple", " 12"), words.encode(" apple") + words.encode(" 12"))
        self.assertNotIn(0, words.encode(" apple"))
        self.assertNotEqual(plain.digest, words.digest)

    def test_a_directory_without_tokenizer_is_named(self):
        with self.assertRaisesRegex(UsageError, "tokenizer.json"):
            TextTokenizer(self.tmp)
        (self.tmp / "tokenizer.json").write_text("{}")
        with self.assertRaisesRegex(UsageError, "tokenizer.json"):
            TextTokenizer(self.tmp)


class Haystacks(eval_support.TokenizerTest):
    def test_a_haystack_has_the_tokens_asked_for_and_whole_sentences_but_the_first(self):
        tokenizer = TextTokenizer(self.models[1])
        for source in (filler.Filler.made(tokenizer), filler.Filler.noise(tokenizer)):
            for num_tokens in (0, 1, 7, 500, 3001):
                haystack = source.take(num_tokens, random.Random(1))
                self.assertEqual(len(haystack.ids), num_tokens)
                for begin, end in zip(haystack.borders[1:-1], haystack.borders[2:]):
                    self.assertRegex(tokenizer.decode(haystack.ids[begin:end]), r"^ [A-Z][^.]*\.$")

    def test_pieces_are_put_between_sentences_in_order_of_depth(self):
        haystack = filler.Haystack(list(range(10)), [0, 4, 8, 10])
        ids, begins = haystack.insert([(1.0, [91]), (0.0, [92, 93]), (0.45, [94])])
        self.assertEqual(ids, [92, 93, 0, 1, 2, 3, 94, 4, 5, 6, 7, 8, 9, 91])
        self.assertEqual(begins, [13, 0, 6])

    def test_a_text_of_the_user_is_read_in_order_and_again_when_it_is_too_short(self):
        text = "First one. Second one! Third\nline here. "
        (self.tmp / "a.txt").write_text(text)
        tokenizer = TextTokenizer(self.models[0])
        haystack = filler.Filler.of_files(tokenizer, self.tmp).take(3 * len(text), random.Random(2))
        self.assertIn(tokenizer.decode(haystack.ids), 5 * text)

    def test_texts_come_from_lines_of_json_and_directories(self):
        (self.tmp / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
        (self.tmp / "a.txt").write_text("one")
        self.assertEqual(filler.read_texts(self.tmp), ["one", "two", "three"])
        for name, content in (("no.jsonl", "{}\n"), ("broken.jsonl", "x\n")):
            (self.tmp / name).write_text(content)
            with self.assertRaisesRegex(UsageError, name):
                filler.read_texts(self.tmp / name)
        with self.assertRaisesRegex(UsageError, "absent"):
            filler.read_texts(self.tmp / "absent.txt")


class End(eval_support.TokenizerTest):
    def test_the_needle_is_there_once_at_its_depth_and_asked_at_the_end(self):
        for model in self.models:
            tokenizer = TextTokenizer(model)
            for sample in self.samples("niah-end", model, lengths=(3000, 4099), depths=3, samples=2):
                self.assertEqual((len(sample.ids), sample.ids.dtype), (sample.length, numpy.int32))
                self.assertEqual(sample.ids[: len(tokenizer.prefix)].tolist(), tokenizer.prefix)
                question, = sample.questions
                prompt, answers = eval_support.prompt_text(sample, tokenizer)
                asked = QUESTION.search(prompt)
                statements = dict(STATEMENT.findall(prompt))
                self.assertEqual(len(statements), 1 + niah._MIN_DISTRACTORS)
                self.assertEqual(statements[asked[1]], answers[0].strip())
                self.assertTrue(prompt.rstrip().endswith("The number is:"))
                wanted = float(re.search(r"depth-([\d.]+)", sample.name)[1])
                self.assertAlmostEqual(question.depth, wanted, delta=0.15)
                begin = int(question.depth * sample.length + 0.5)
                self.assertTrue(tokenizer.decode(sample.ids[begin:].tolist()).startswith("\nThe special magic number for " + asked[1]))
                # The last answer token is predicted by the last token of the prompt.
                self.assertEqual(question.positions[-1], len(sample.ids) - 1)
                self.assertEqual(sample.ids[question.position + 1 :].tolist(), list(question.answer[:-1]))

    def test_a_length_that_is_too_short_is_refused_with_the_least(self):
        with self.assertRaisesRegex(UsageError, "--length 100: niah-end needs at least"):
            self.samples("niah-end", self.models[1], lengths=(100,))

    def test_samples_depend_on_the_seed_and_nothing_else(self):
        digests = [[s.digest() for s in self.samples("niah-end", self.models[1], depths=2, samples=2, seed=seed)]
                   for seed in (1, 1, 2)]
        self.assertEqual(digests[0], digests[1])
        self.assertEqual(len(set(digests[0] + digests[2])), 8)

    def test_key_words_of_the_model_are_used(self):
        (self.models[0] / "words.json").write_text('{"w1": ["%s"], "w2": ["%s"]}' % ('","'.join("abcde"), '","'.join("vwxyz")))
        self.addCleanup((self.models[0] / "words.json").unlink)
        for sample in self.samples("niah-end", self.models[0], depths=1):
            self.assertRegex(eval_support.prompt_text(sample, TextTokenizer(self.models[0]))[0], r"number for [a-e] [v-z]\?")


class Spread(eval_support.TokenizerTest):
    def test_every_question_was_answered_by_a_statement_before_it(self):
        for model in self.models:
            tokenizer = TextTokenizer(model)
            sample, = self.samples("niah-spread", model, lengths=(5000,))
            self.assertEqual(len(sample.ids), 5000)
            text = tokenizer.decode(sample.ids.tolist())
            statements = {m[1]: (m.start(), m[2]) for m in STATEMENT.finditer(text)}
            questions = list(QUESTION.finditer(text))
            self.assertEqual(len(statements) + len(questions), 5000 // niah.SLOT)
            self.assertEqual(len(sample.questions), len(questions))
            for match, question in zip(questions, sample.questions, strict=True):
                begin, number = statements[match[1]]
                self.assertLess(begin, match.start())
                self.assertEqual(number, match[2])
                self.assertEqual(tokenizer.decode(list(question.answer)).strip(), number)
                answer = sample.ids[question.position + 1 : question.position + 1 + len(question.answer)]
                self.assertEqual(answer.tolist(), list(question.answer))
                self.assertAlmostEqual(question.depth, question.position / 5000, places=9)

    def test_questions_are_thinned_out_evenly_when_their_logits_do_not_fit(self):
        whole, = self.samples("niah-spread", self.models[1], lengths=(16000,))
        width = len(whole.questions[0].answer)
        thin, = self.samples("niah-spread", self.models[1], lengths=(16000,), max_positions=10 * width + 1)
        self.assertEqual(whole.ids.tolist(), thin.ids.tolist())
        self.assertEqual(len(thin.questions), 10)
        self.assertEqual(set(thin.questions) - set(whole.questions), set())
        self.assertGreater(thin.questions[-1].depth, 0.8)
        with self.assertRaisesRegex(UsageError, "--logits-memory"):
            self.samples("niah-spread", self.models[1], lengths=(16000,), max_positions=width - 1)


if __name__ == "__main__":
    unittest.main()
