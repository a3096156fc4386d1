#!/usr/bin/env python3
"""RULER's tasks hold what their published definitions say, for tokenizers of two kinds; texts are read back from the token ids."""

import collections
import json
import re
import unittest

import eval_support

from longfill.eval import ruler, ruler_qa, ruler_text
from longfill.eval.errors import UsageError
from longfill.eval.tokens import TextTokenizer

LENGTH = {"bytes": 12000, "words": 5000}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KEY = {"words": r"[a-z]+-[a-z]+(?:-[a-z]+)?", "uuids": UUID}
VALUE = {"numbers": r"\d{7}", "uuids": UUID}
SQUAD = {"data": [{"paragraphs": [
    {"context": f"Paragraph {i} says that the color of house {i} is c{i}.",
     "qas": [{"question": f"What is the color of house {i}?", "answers": [{"text": f"c{i}"}, {"text": "other"}]},
             {"question": "Unanswerable?", "answers": [], "is_impossible": True}]} for i in range(400)]}]}
HOTPOT = [{"question": f"Where is {i}?", "answer": f"at {i}",
           "context": [[f"Title {i} {j}", [f"Sentence {i} {j}.", " And more."]] for j in range(3)]} for i in range(150)]


class Ruler(eval_support.TokenizerTest):
    def each(self, task, samples=2, **settings):
        """(sample, its prompt, its answers, tokenizer) of both tokenizers, after what holds for all tasks was checked."""
        for model in self.models:
            tokenizer, length = TextTokenizer(model), LENGTH[model.name]
            made = self.samples(f"ruler:{task}", model, lengths=(length,), samples=samples, **settings)
            again, = self.samples(f"ruler:{task}", model, lengths=(length,), samples=1, **settings)
            self.assertEqual(made[0].digest(), again.digest())
            self.assertEqual(len({s.digest() for s in made}), samples)
            for sample in made:
                self.assertLessEqual(len(sample.ids), length)
                self.assertEqual(sample.ids[: len(tokenizer.prefix)].tolist(), tokenizer.prefix)
                for question in sample.questions:
                    self.assertEqual(sample.ids[question.position + 1 :][: len(question.answer)].tolist(),
                                     list(question.answer)[: len(sample.ids) - question.position - 1])
                # All but the last token of the last answer.
                self.assertEqual(sample.questions[-1].positions[-1], len(sample.ids) - 1)
                prompt, answers = eval_support.prompt_text(sample, tokenizer)
                yield sample, prompt, [answer.strip() for answer in answers], tokenizer

    def test_needles(self):
        for task, kind in ruler.NEEDLES.items():
            needle = re.compile(rf"The hidden {kind.value[:-1]} for ({KEY[kind.key]}) is ({VALUE[kind.value]})\.")
            for sample, prompt, answers, _ in self.each(task):
                with self.subTest(task):
                    found = needle.findall(prompt)
                    by_key = collections.defaultdict(list)
                    for key, value in found:
                        by_key[key].append(value)
                    question = prompt[prompt.rindex("\n\n"):]
                    asked = list(dict.fromkeys(re.findall(KEY[kind.key], question)))
                    self.assertEqual(len(asked), kind.queries)
                    # Every value that is asked for is in the text once, in the order asked for.
                    self.assertEqual([value for key in asked for value in by_key[key]], answers)
                    self.assertEqual(len(answers), kind.queries * kind.values)
                    for answer in answers:
                        self.assertEqual(prompt.count(answer), 1)
                    if kind.haystack == "needles":
                        self.assertGreater(len(found), 30)
                        self.assertEqual(len(by_key), len(found))
                        between = needle.sub("", prompt[prompt.index("\n\n"):prompt.rindex("\n\n")])
                        self.assertEqual(between.strip(), "")
                        self.assertGreater(len(sample.ids), sample.length - 150)
                    else:
                        self.assertEqual(len(found), kind.keys * kind.values)
                        self.assertEqual(len(sample.ids), sample.length)

    def test_needles_stand_where_their_depth_says(self):
        for sample, _, answers, tokenizer in self.each("niah_multiquery"):
            for question, answer in zip(sample.questions, answers, strict=True):
                at = round(question.depth * sample.length)
                self.assertIn(answer, tokenizer.decode(sample.ids[at : at + 100].tolist()))

    def test_the_needle_asked_for_is_not_always_the_first_of_several(self):
        model = self.models[1]
        depths = [s.questions[0].depth for s in self.samples("ruler:niah_multikey_1", model, lengths=(3000,), samples=12)]
        self.assertLess(min(depths), 0.4)
        self.assertGreater(max(depths), 0.6)

    def test_variables_form_one_chain_in_order(self):
        for sample, prompt, answers, _ in self.each("vt"):
            assigned = re.findall(r"VAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})\.", prompt)
            value = re.search(r"have the value (\d{5})", prompt)[1]
            self.assertEqual([name for name, _ in assigned], answers)
            self.assertEqual([source for _, source in assigned], [value, *(f"VAR {name}" for name in answers[:-1])])
            self.assertEqual((len(set(answers)), len(sample.ids)), (1 + ruler_text.NUM_HOPS, sample.length))

    def test_common_words_come_thirty_times_and_others_three_times(self):
        for sample, prompt, answers, _ in self.each("cwe"):
            entries = re.findall(r" (\d+)\. (\S+)", prompt)
            self.assertEqual([int(number) for number, _ in entries], list(range(1, len(entries) + 1)))
            counts = collections.Counter(word for _, word in entries)
            self.assertEqual(answers, sorted(word for word, count in counts.items() if count == 30))
            self.assertEqual(len(answers), 10)
            self.assertEqual(collections.Counter(counts.values()), {30: 10, 3: len(counts) - 10})
            self.assertGreater(len(sample.ids), sample.length - 150)
            # Shuffled: the common ones are all over the list.
            places = [i for i, (_, word) in enumerate(entries) if word in answers]
            self.assertAlmostEqual(sum(places) / len(places) / len(entries), 0.5, delta=0.15)

    def test_frequent_words_follow_the_zeta_distribution(self):
        self.assertEqual(ruler_text.zeta_counts(1000, 5), [607, 151, 67, 37, 24])  # 1000 / (k^2 pi^2/6)
        for sample, prompt, answers, _ in self.each("fwe"):
            words = re.findall(r"\.\.\.|\b[a-z]{6}\b", prompt[prompt.index("\n\n"):prompt.rindex("\n\n")])
            ranked = collections.Counter(words).most_common()
            self.assertEqual(ranked[0][0], "...")
            self.assertEqual([word for word, _ in ranked[1:4]], answers)
            top = ranked[0][1]
            for rank, (_, count) in enumerate(ranked[:6], 1):
                self.assertAlmostEqual(count, top / rank**2, delta=1)
            self.assertGreater(ranked[3][1], ranked[4][1])
            self.assertGreater(len(sample.ids), 0.9 * sample.length)

    def test_the_document_of_a_question_is_among_others_once(self):
        squad, hotpotqa = self.tmp / "squad.json", self.tmp / "hotpotqa.json"
        squad.write_text(json.dumps(SQUAD))
        hotpotqa.write_text(json.dumps(HOTPOT))
        for _, prompt, answers, _ in self.each("qa_1", squad=squad):
            house = re.search(r"Question: What is the color of house (\d+)\? Answer: ?$", prompt)[1]
            self.assertEqual(answers, [f"c{house}"])
            self.assertEqual(prompt.count(f"Paragraph {house} says"), 1)
            numbers = [int(n) for n in re.findall(r"^Document (\d+):$", prompt, re.MULTILINE)]
            self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
            self.assertGreater(len(numbers), 20)
        for _, prompt, answers, _ in self.each("qa_2", hotpotqa=hotpotqa):
            number = re.search(r"Question: Where is (\d+)\?", prompt)[1]
            self.assertEqual(answers, [f"at {number}"])
            for j in range(3):
                self.assertEqual(prompt.count(f"Title {number} {j}\nSentence {number} {j}. And more."), 1)

    def test_what_is_missing_or_too_short_is_named(self):
        model = self.models[1]
        for task in ("qa_1", "qa_2"):
            with self.assertRaisesRegex(UsageError, f"ruler:{task} needs --"):
                eval_support.tasks.expand([f"ruler:{task}"], eval_support.tasks.Settings(model, (100,)))
        for task in (*ruler.NEEDLES, *ruler.TEXTS):
            with self.assertRaisesRegex(UsageError, "--length 60: ruler:"):
                self.samples(f"ruler:{task}", model, lengths=(60,))
        (self.tmp / "no.json").write_text("[1]")
        for read in (ruler_qa.read_squad, ruler_qa.read_hotpotqa):
            with self.assertRaisesRegex(UsageError, "no.json"):
                read(self.tmp / "no.json")

    def test_ruler_stands_for_all_that_there_are_files_for(self):
        settings = eval_support.tasks.Settings(self.models[0], (100,))
        self.assertEqual(len(eval_support.tasks.expand(["ruler", "ruler:vt"], settings)), 11)
        settings = eval_support.tasks.Settings(self.models[0], (100,), squad=self.tmp, hotpotqa=self.tmp)
        self.assertEqual(len(eval_support.tasks.expand(["ruler"], settings)), 13)


if __name__ == "__main__":
    unittest.main()
