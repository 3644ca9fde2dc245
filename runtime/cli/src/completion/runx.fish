# Completion of runx for fish 3 and later: "runx completion fish" prints this.
function __runx_complete
    set -l words (commandline --cut-at-cursor --tokenize --current-process)
    set -l current (commandline --cut-at-cursor --current-token)
    for line in ($words[1] __complete fish $words[2..-1] "$current" 2>/dev/null)
        set -l parts (string split \t -- $line)
        switch $parts[1]
            case current
                set current $parts[2]
            case word
                echo -e -- "$parts[2]\t$parts[3]"
            case files
                __fish_complete_path "$current"
            case directories
                __fish_complete_directories "$current" ''
            case programs
                __fish_complete_command
        end
    end
end
complete --command runx --no-files --arguments '(__runx_complete)'
