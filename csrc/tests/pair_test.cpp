int main_placeholder_pair;
