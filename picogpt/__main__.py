from picogpt.cli import main

main()
