"""The data is cut up without leaks."""

import torch

from funcfreeze.demos.digits import all_digits, batches, only, two_domains


def test_no_image_is_in_two_sets():
    domains = two_domains(0)
    parts = [domains.source, domains.target, domains.source_test, domains.target_test]
    every = torch.cat([part.index for part in parts])
    assert sorted(every.tolist()) == list(range(len(all_digits())))


def test_no_two_digits_are_the_same_image():
    assert len(torch.unique(all_digits().pixels, dim=0)) == len(all_digits())


def test_target_images_have_a_noisy_background_and_keep_their_ink():
    digits, domains = all_digits(), two_domains(0)
    for noisy in (domains.target, domains.target_test):
        clean = digits.pixels[noisy.index]
        changed = noisy.pixels != clean
        assert (changed.sum(1) > 20).all()
        assert not changed[clean == 1].any()
        assert (noisy.pixels >= clean).all()
        assert (noisy.pixels <= 1).all()
    for kept in (domains.source, domains.source_test):
        assert torch.equal(kept.pixels, digits.pixels[kept.index])


def test_labels_follow_their_images():
    digits, domains = all_digits(), two_domains(3)
    assert torch.equal(domains.target_test.labels, digits.labels[domains.target_test.index])


def test_seeds_fix_split_noise_and_batches():
    same, other = two_domains(1), two_domains(2)
    assert torch.equal(same.target.pixels, two_domains(1).target.pixels)
    assert not torch.equal(same.source.index, other.source.index)
    first, again = (list(batches(same, 1, 3, 8)) for _ in range(2))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))


def test_batches_hold_training_images_only_and_no_target_label():
    domains = two_domains(0)
    pixels = {tuple(row.tolist()) for row in domains.source.pixels}
    noisy = {tuple(row.tolist()) for row in domains.target.pixels}
    for batch in batches(domains, 0, 5, 16):
        source, labels, target = batch
        assert {tuple(row.tolist()) for row in source} <= pixels
        assert {tuple(row.tolist()) for row in target} <= noisy
        assert len(labels) == len(source)


def test_only_keeps_the_digits_asked_for():
    assert set(only(all_digits(), range(5, 10)).labels.tolist()) == {5, 6, 7, 8, 9}
