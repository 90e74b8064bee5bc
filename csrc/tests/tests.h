// Tests of the standalone driver that lie in files of their own. Each adds up its cases and returns its failures.
#pragma once

int bf16_product_failures(int& cases);
int linear_token_stats_failures(int& cases);
int pair_failures(int& cases);
int segments_failures(int& cases);
