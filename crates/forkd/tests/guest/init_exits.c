/* An agent that ends at once: the kernel panics, since PID 1 is gone. */
int main(void) { return 1; }
